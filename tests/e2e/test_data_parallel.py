"""Data parallelism with `l1-disk`: each replica has its own directory, and its share of both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcache.sizes import parse_size
from tests.e2e.test_below import on_disk
from tests.support.engine.engine import BLOCK, Setup, prompt
from tests.support.engine.openai_server import Server, serving

pytestmark = pytest.mark.engine

CAPACITY = "16MiB"
STORED = re.compile(
    r'^vllm:kvcache_tier_stores_total\{.*engine="(\d)".*result="stored".*tier="disk".*\} (\S+)$',
    re.MULTILINE,
)
ASKED = [prompt(f"of replica {index}", 5 * BLOCK + 9) for index in range(2)]


def ask(server: Server, index: int) -> int:
    """Have replica ``index`` complete its prompt; the cached tokens."""
    return server.complete(ASKED[index], {"X-data-parallel-rank": str(index)})


def taken(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "spaces"]
    return sum(file.stat().st_blocks * 512 for file in files)


def test_replicas_keep_their_blocks_apart_and_an_engine_alone_finds_the_first_ones(
    checkpoint: Path, tmp_path: Path
) -> None:
    kv = tmp_path / "disk" / "kv"
    environment = on_disk(tmp_path / "disk") | {
        "KVCACHE__L1__CAPACITY": "1%", "KVCACHE__DISK__CAPACITY": CAPACITY,
    }  # fmt: skip
    setup = Setup(str(checkpoint), blocks=40, environment=environment)
    options = ["--data-parallel-size", "2", "--api-server-count", "1"]
    with serving(setup, tmp_path, *options) as server:
        assert [ask(server, index) for index in range(2)] == [0, 0]
        server.wait(lambda: stored(server) == {"0": 5, "1": 5})
        server.post("/reset_prefix_cache")
        assert [ask(server, index) for index in range(2)] == [5 * BLOCK] * 2
        assert taken(kv) <= parse_size(CAPACITY)
        assert (kv / "replica-1" / "blocks").exists()
        log = server.log.read_text()
        assert "replica 1 of 2, with 8MiB of a capacity of 16MiB" in log
        assert 'capacity = "1%"' in log  # what became of it
    with serving(setup, tmp_path) as server:
        assert server.complete(ASKED[0]) == 5 * BLOCK
        assert server.complete(ASKED[1]) == 0
        assert not (kv / "replica-1").exists()
        assert taken(kv) <= parse_size(CAPACITY)


def stored(server: Server) -> dict[str, int]:
    """Blocks that each replica has written to its disk."""
    return {engine: int(float(value)) for engine, value in STORED.findall(server.get("/metrics"))}
