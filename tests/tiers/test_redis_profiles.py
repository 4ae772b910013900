"""Shipped profiles with Redis: stacks share blocks, and recompute lost ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("redis")
pytest.importorskip("xxhash")

from kvcache.stack import Stack
from kvcache.testing import keys_of
from tests.support import redis_servers
from tests.support.profile_stacks import KEYS, NAMESPACE, check, load_prefix, opened_stack, store
from tests.support.redis_servers import Server
from tests.support.waiting import eventually

Open = Callable[..., Stack]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with redis_servers.server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def opened(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a stack of a shipped profile for one engine, on the server."""
    with ExitStack() as stacks:

        def opened(
            profile: str, engine: str, namespace: bytes = NAMESPACE, deadline_s: float = 30
        ) -> Stack:
            monkeypatch.setenv("KVCACHE__L1__CAPACITY", "4MiB")
            monkeypatch.setenv("KVCACHE__REDIS__URL", server.url)
            monkeypatch.setenv("KVCACHE__REDIS__DEADLINE_S", str(deadline_s))
            monkeypatch.setenv("KVCACHE__REDIS__TIMEOUT_S", str(deadline_s))
            if "disk" in profile:
                monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / engine))
                monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "4MiB")
            return stacks.enter_context(opened_stack(profile, namespace))

        yield opened


@pytest.mark.parametrize("profile", ["l1-redis", "l1-disk-redis"])
def test_stacks_on_one_server_load_each_others_blocks(
    opened: Open, server: Server, profile: str
) -> None:
    first, second = opened(profile, "first"), opened(profile, "second")
    store(first)
    assert server.client().dbsize() == len(KEYS)
    assert load_prefix(second, [*KEYS, *keys_of("more", 2)]) == len(KEYS)
    assert load_prefix(opened(profile, "other model", keys_of("other", 1)[0])) == 0
    store(opened(profile, "third"))  # the server has the blocks already
    assert server.client().dbsize() == len(KEYS)
    check(first, len(KEYS))


def test_disk_between_keeps_blocks_that_the_server_lost(opened: Open, server: Server) -> None:
    first = opened("l1-disk-redis", "first")
    store(first)
    first.front.clear()
    server.client().flushall()
    assert load_prefix(first) == len(KEYS)
    server.kill()
    first.front.clear()
    assert load_prefix(first) == len(KEYS)
    check(first, len(KEYS))


def test_blocks_lost_by_the_server_end_the_prefix(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second")
    store(first)
    client = server.client()
    names = sorted(client.keys("*"))
    lost = [f"kvcache:1:{NAMESPACE.hex()}:{key.hex()}".encode() for key in KEYS[7:9]]
    assert client.unlink(*lost) == 2
    assert len(names) == len(KEYS)
    assert load_prefix(second) == 7
    store(second)
    assert load_prefix(opened("l1-redis", "third")) == len(KEYS)


def test_damaged_value_ends_the_prefix_and_is_removed(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second")
    store(first)
    name = f"kvcache:1:{NAMESPACE.hex()}:{KEYS[5].hex()}"
    server.client().setrange(name, 9000, b"damage")
    assert load_prefix(second) == 5
    assert not server.client().exists(name)
    store(second)
    assert load_prefix(opened("l1-redis", "third")) == len(KEYS)


def test_killed_server_costs_hits_and_recovers(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second")
    store(first)
    server.kill()
    assert load_prefix(second) == 0
    assert load_prefix(first) == len(KEYS)  # from L1
    store(second, keys_of("while it is down", 5))
    check(second, 5)
    server.start()
    second.front.clear()
    more = [keys_of(f"again {at}", 1) for at in range(10_000)]

    def recovered() -> bool:  # the circuit breaker tries again after a second
        store(second, more.pop())
        return bool(server.client().dbsize())

    eventually(recovered, "it is asked again")


def test_hanging_server_stalls_no_request_and_keeps_no_slot(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second", deadline_s=0.2)
    store(first)
    with server.stopped():
        assert load_prefix(second) == 0
        store(second)
        eventually(lambda: second.stats().pinned_slots == 0, "every slot comes back")
        check(second, len(KEYS))
    assert load_prefix(second) == len(KEYS)
