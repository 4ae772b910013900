"""Data parallelism with `l1-disk`: each replica has a directory and its share of capacities."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcache.sizes import parse_size
from tests.e2e.test_below import on_disk
from tests.support.engine.engine import BLOCK, EngineSettings, prompt
from tests.support.engine.openai_server import OpenAIServer, serve_openai

pytestmark = pytest.mark.engine

CAPACITY = "16MiB"
STORED = re.compile(
    r'^vllm:kvcache_tier_stores_total\{.*engine="(\d)".*result="stored".*tier="disk".*\} (\S+)$',
    re.MULTILINE,
)
PROMPTS = [prompt(f"of replica {index}", 5 * BLOCK + 9) for index in range(2)]


def complete(server: OpenAIServer, index: int) -> int:
    """Complete the prompt of replica ``index`` on it; return the cached tokens."""
    return server.complete(PROMPTS[index], {"X-data-parallel-rank": str(index)})


def disk_nbytes(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "spaces"]
    return sum(file.stat().st_blocks * 512 for file in files)


def test_replicas_have_directories_of_their_own_and_a_single_engine_finds_the_first(
    checkpoint: Path, tmp_path: Path
) -> None:
    kv = tmp_path / "disk" / "kv"
    environment = on_disk(tmp_path / "disk") | {
        "KVCACHE__L1__CAPACITY": "1%", "KVCACHE__DISK__CAPACITY": CAPACITY,
    }  # fmt: skip
    setup = EngineSettings(str(checkpoint), blocks=40, environment=environment)
    options = ["--data-parallel-size", "2", "--api-server-count", "1"]
    with serve_openai(setup, tmp_path, *options) as server:
        assert [complete(server, index) for index in range(2)] == [0, 0]
        server.wait_until(lambda: stored(server) == {"0": 5, "1": 5})
        server.post("/reset_prefix_cache")
        assert [complete(server, index) for index in range(2)] == [5 * BLOCK] * 2
        assert disk_nbytes(kv) <= parse_size(CAPACITY)
        assert (kv / "replica-1" / "blocks").exists()
        log = server.log.read_text()
        assert "replica 1 of 2, with 8MiB of a capacity of 16MiB" in log
        assert 'capacity = "1%"' in log  # the share of each replica
    with serve_openai(setup, tmp_path) as server:
        assert server.complete(PROMPTS[0]) == 5 * BLOCK
        assert server.complete(PROMPTS[1]) == 0
        assert not (kv / "replica-1").exists()
        assert disk_nbytes(kv) <= parse_size(CAPACITY)


def stored(server: OpenAIServer) -> dict[str, int]:
    """Return the number of blocks that each replica has written to its disk."""
    return {engine: int(float(value)) for engine, value in STORED.findall(server.get("/metrics"))}
