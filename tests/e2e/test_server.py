"""The OpenAI server with the settings that the connector's own documentation gives, over HTTP."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine import separate_processes
from tests.support.engine.engine import BLOCK, EngineSettings, prompt
from tests.support.engine.openai_server import OpenAIServer, serve_openai

pytestmark = pytest.mark.engine

END_S = 60.0
LOGS = {"VLLM_LOG_STATS_INTERVAL": "1"}  # seconds


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIServer]:
    setup = EngineSettings(str(checkpoint), blocks=40, l1="64MiB", environment=LOGS)
    with serve_openai(setup, tmp_path_factory.mktemp("server")) as served:
        yield served


def assert_metrics_of_l1(page: str, hits: int, stored: int) -> None:
    """Check that vLLM's page has the metrics of L1, and help texts of all metrics."""
    from kvcache import metrics
    from kvcache.connectors.vllm.metrics import prometheus_name

    for metric in metrics.METRICS:
        assert f"# HELP {prometheus_name(metric)}" in page
    lines = re.findall(r"^vllm:kvcache_tier_(\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
    values: dict[tuple[str, ...], float] = {}
    for name, labels, value in lines:
        words = dict(re.findall(r'(\w+)="(.*?)"', labels))
        assert words.pop("tier") == "l1"
        assert words.pop("type") == "dram"
        assert words.pop("engine") == "0"
        del words["model_name"]
        values[name, *sorted(words.values())] = float(value)
    assert values["lookups_total", "hit"] == hits
    assert values["stores_total", "stored"] == stored
    block = values["io_bytes_total", "write"] / stored
    assert values["io_bytes_total", "read"] == hits * block
    assert values["usage_bytes",] == stored / 2 * block  # the reset removed the first half
    assert values["pinned",] == 0
    durations = "operation_duration_seconds_count"
    assert values[durations, "", "lookup"] >= 3
    assert values[durations, "", "load"] == 1
    assert values[durations, "", "store"] == 2
    assert 0 < values["operation_duration_seconds_sum", "", "load"] < 60


def test_hit_is_in_usage_and_metrics(server: OpenAIServer) -> None:
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
    assert_metrics_of_l1(server.get("/metrics"), hits=5, stored=10)
    log = server.log.read_text()
    assert "kvcache: connector: profile l1-only" in log
    assert not re.search("(WARNING|ERROR).*kvcache: ", log)


def test_log_has_a_line_of_hits(server: OpenAIServer) -> None:
    asked = prompt("logged", 3 * BLOCK + 9)
    server.complete(asked)
    server.post("/reset_prefix_cache")
    before = len(server.log.read_text())
    assert server.complete(asked) == 3 * BLOCK
    until = time.monotonic() + END_S
    while time.monotonic() < until:
        line = (
            r"KV Transfer metrics: l1 hits=(\d+)/\d+, l1 read=\d+KiB, l1 written=\d+KiB, l1 used="
        )
        counts = re.findall(line, server.log.read_text()[before:])
        if any(int(hits) >= 3 for hits in counts):  # other requests of that second count too
            return
        time.sleep(0.2)  # another process logs it once a second
    raise AssertionError(server.log.read_text()[before:])


def test_end_of_the_server_frees_all_slabs(server: OpenAIServer) -> None:
    """Must be the last test of the module, since it ends the server."""
    family = separate_processes.family(server.process.pid)
    assert os.getpid() not in family
    assert [pid for pid in family if separate_processes.slabs_of(pid)]
    alive = [os.pidfd_open(pid) for pid in family]
    server.process.terminate()
    for pidfd in alive:
        ended, _, _ = select.select([pidfd], [], [], END_S)
        os.close(pidfd)
        assert ended, "a process of the server has not ended"
    server.process.wait()
    assert not [pid for pid in family if separate_processes.slabs_of(pid)]
