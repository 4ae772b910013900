"""kvcache's servers below vLLM's own manager: engines on one server find each other's blocks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.support import redis_servers
from tests.support.played_tiering import PlayedTiering, disk_table, keep, keys_of, played
from tests.support.waiting import PATIENCE_S, eventually

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("same_weights")]

DEADLINE_S = 0.5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis_servers.Server]:
    server = redis_servers.Server(tmp_path / "server").start()
    yield server
    server.kill()


def table(server: redis_servers.Server, deadline_s: float = PATIENCE_S) -> dict[str, object]:
    """Return the options of a tier on that server."""
    return {"name": "redis", "kind": "redis", "url": server.url, "deadline_s": deadline_s}


def check(engine: PlayedTiering, keys: list[Any]) -> list[bool]:
    """Return which keys the engine finds; checks their bytes."""
    request = engine.start("finds")
    held = engine.find(request, keys)
    hits = [key for key, is_held in zip(keys, held, strict=True) if is_held]
    assert engine.read(request, hits) == engine.expected(hits)
    engine.finish(request)
    return held


def test_engines_share_blocks_through_a_server(server: redis_servers.Server) -> None:
    keys = keys_of("a", 6)
    options = {"tiers": [table(server)]}
    with played(options) as other:
        keep(options, keys)
        assert check(other, [*keys, *keys_of("b", 1)]) == [True] * 6 + [False]


def test_nearest_tier_returns_blocks_and_a_lost_server_costs_misses(
    server: redis_servers.Server, tmp_path: Path
) -> None:
    disk = disk_table(tmp_path)
    both = {"tiers": [disk, table(server)]}
    keep({"tiers": [table(server)]}, keys_of("redis", 2))
    keep(both, keys_of("both", 3))
    with played(both) as engine:
        assert check(engine, [*keys_of("redis", 2), *keys_of("both", 3)]) == [True] * 5
    server.kill()
    with played(both) as engine:
        assert (
            check(engine, [*keys_of("both", 3), *keys_of("redis", 2)]) == [True] * 3 + [False] * 2
        )


def test_stopped_server_costs_misses_and_is_used_again(server: redis_servers.Server) -> None:
    keys = keys_of("a", 4)
    keep({"tiers": [table(server)]}, keys)
    with played({"tiers": [table(server, DEADLINE_S)]}, rows=64) as engine:
        server.signal(signal.SIGSTOP)
        request = engine.start("stopped")
        assert engine.find(request, keys) == [False] * 4
        engine.store(request, keys_of("b", 3))
        engine.settle()
        engine.finish(request)
        server.signal(signal.SIGCONT)
        eventually(lambda: all(check(engine, keys)), "the server is used again")
