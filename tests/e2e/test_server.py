"""The OpenAI server with the settings that the connector's own documentation gives, over HTTP."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import processes
from tests.e2e.engine import BLOCK, Setup, prompt
from tests.e2e.server import Server, serving

pytestmark = pytest.mark.engine

END_S = 60.0


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    setup = Setup(str(checkpoint), blocks=40, l1="64MiB")
    with serving(setup, tmp_path_factory.mktemp("server")) as served:
        yield served


def test_hits_show_in_usage_and_metrics(server: Server) -> None:
    asked = prompt("served", 5 * BLOCK + 9)
    assert server.complete(asked) == 0
    server.post("/reset_prefix_cache")
    assert server.complete(asked) == 5 * BLOCK
    [hits] = re.findall(
        r"^vllm:external_prefix_cache_hits_total\{.*\} (\S+)$", server.get("/metrics"), re.MULTILINE
    )
    assert float(hits) == 5 * BLOCK
    server.post("/reset_prefix_cache?reset_external=true")
    assert server.complete(asked) == 0
    said = server.log.read_text()
    assert "kvcache: profile l1-only" in said
    assert not re.search("(WARNING|ERROR).*kvcache: ", said)


def test_no_memory_is_left_when_it_ends(server: Server) -> None:
    """The last test of the module: it ends the server."""
    family = processes.family(server.process.pid)
    assert os.getpid() not in family
    assert [pid for pid in family if processes.slabs_of(pid)]
    alive = [os.pidfd_open(pid) for pid in family]
    server.process.terminate()
    for pidfd in alive:
        ended, _, _ = select.select([pidfd], [], [], END_S)
        os.close(pidfd)
        assert ended, "a process of the server's has not ended"
    server.process.wait()
    assert not [pid for pid in family if processes.slabs_of(pid)]
