"""An object store below vLLM's own manager: engines find each other's blocks in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.support import s3_server
from tests.support.played_tiering import PlayedTiering, keep, keys_of, played
from tests.support.waiting import PATIENCE_S, eventually

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("same_weights")]

_prefixes = (f"secondary-{number}" for number in count())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Server]:
    with s3_server.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of these tests may use the store."""
    s3_server.set_login(monkeypatch)


@pytest.fixture
def prefix() -> str:
    """A prefix without objects."""
    return next(_prefixes)


def options(
    server: s3_server.Server, prefix: str, deadline_s: float = PATIENCE_S, **more: object
) -> dict[str, object]:
    """Return options of a secondary tier with objects that begin with ``prefix``."""
    table = {"name": "object", "kind": "object", "deadline_s": deadline_s, "timeout_s": deadline_s}
    return {"tiers": [{**table, **server.options(prefix), **more}]}


def check(engine: PlayedTiering, name: str, keys: list[Any]) -> list[bool]:
    """Return which keys the engine finds for a request; checks their bytes."""
    request = engine.start(name)
    held = engine.find(request, keys)
    hits = [key for key, is_held in zip(keys, held, strict=True) if is_held]
    assert engine.read(request, hits) == engine.expected(hits)
    engine.finish(request)
    return held


@pytest.mark.parametrize("lookup", ["ask", "load"])
def test_second_manager_finds_blocks_in_an_object_store(
    server: s3_server.Server, prefix: str, lookup: str
) -> None:
    keys = keys_of("a", 4)
    keep(options(server, prefix, lookup=lookup), keys)
    assert len([name for name in server.names(prefix) if "/about/" not in name]) == 4
    with played(options(server, prefix, lookup=lookup)) as engine:
        assert check(engine, "finds", [*keys, *keys_of("b", 2)]) == [True] * 4 + [False] * 2


def test_stopped_object_store_costs_misses_and_is_used_again(
    server: s3_server.Server, prefix: str
) -> None:
    keys = keys_of("a", 3)
    keep(options(server, prefix), keys)
    with played(options(server, prefix, deadline_s=1.0), rows=64) as engine:
        with server.stopped():
            assert check(engine, "stopped", keys) == [False] * 3
            request = engine.start("stores")
            engine.store(request, keys_of("b", 2))
            engine.settle()
            engine.finish(request)
        eventually(lambda: all(check(engine, "again", keys)), "the object store is used again")
