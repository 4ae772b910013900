"""The shipped profiles with Redis in them: what one stack stored, another loads, or computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("redis")
pytest.importorskip("xxhash")

from kvcache.profiles import open_stack
from kvcache.stack import Stack
from kvcache.testing import block_of, keys_of
from tests.support import redis_servers
from tests.support.redis_servers import Server, eventually

NBYTES = 32 << 10
KEYS = keys_of("chain", 20)
SPACE = keys_of("namespace", 1)[0]

Open = Callable[..., Stack]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with redis_servers.server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def opened(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a stack of a shipped profile, at the server, as one engine has it."""
    with ExitStack() as stacks:

        def opened(
            profile: str, engine: str, namespace: bytes = SPACE, deadline_s: float = 30
        ) -> Stack:
            monkeypatch.setenv("KVCACHE__L1__CAPACITY", "4MiB")
            monkeypatch.setenv("KVCACHE__REDIS__URL", server.url)
            monkeypatch.setenv("KVCACHE__REDIS__DEADLINE_S", str(deadline_s))
            monkeypatch.setenv("KVCACHE__REDIS__TIMEOUT_S", str(deadline_s))
            if "disk" in profile:
                monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / engine))
                monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "4MiB")
            stack = stacks.enter_context(
                open_stack(profile, block_nbytes=NBYTES, namespace=namespace)
            )
            stack.front.slab.wait_populated()
            return stack

        yield opened


def store(stack: Stack, keys: Sequence[bytes] = KEYS) -> None:
    with stack.reserve(keys) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, NBYTES)
    assert stack.flush(30)


def found(stack: Stack, keys: Sequence[bytes] = KEYS) -> int:
    """How much of a prompt is served, every byte as it was."""
    with stack.fetch(stack.match(keys).result()).result() as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(key, NBYTES), "another's bytes"
        return len(lease)


def check(stack: Stack, offered: int) -> None:
    """Nothing is in flight, and of the blocks offered none is lost."""
    stats = stack.stats()
    assert stats.pinned_slots == 0
    for lower in stats.lower:
        kept = lower.stored_blocks + lower.known_blocks
        assert kept + lower.declined_blocks + lower.dropped_blocks == offered


@pytest.mark.parametrize("profile", ["l1-redis", "l1-disk-redis"])
def test_what_one_engine_computed_the_others_load(
    opened: Open, server: Server, profile: str
) -> None:
    first, second = opened(profile, "first"), opened(profile, "second")
    store(first)
    assert server.client().dbsize() == len(KEYS)
    assert found(second, [*KEYS, *keys_of("more", 2)]) == len(KEYS)
    assert found(opened(profile, "other model", keys_of("other", 1)[0])) == 0
    store(opened(profile, "third"))  # computed at the same time: it is there already
    assert server.client().dbsize() == len(KEYS)
    check(first, len(KEYS))


def test_a_disk_between_keeps_what_the_server_lost(opened: Open, server: Server) -> None:
    first = opened("l1-disk-redis", "first")
    store(first)
    first.front.clear()
    server.client().flushall()
    assert found(first) == len(KEYS)
    server.kill()
    first.front.clear()
    assert found(first) == len(KEYS)
    check(first, len(KEYS))


def test_blocks_that_the_server_lost_are_computed_again(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second")
    store(first)
    client = server.client()
    names = sorted(client.keys("*"))
    gone = [f"kvcache:1:{SPACE.hex()}:{key.hex()}".encode() for key in KEYS[7:9]]
    assert client.unlink(*gone) == 2
    assert len(names) == len(KEYS)
    assert found(second) == 7
    store(second)
    assert found(opened("l1-redis", "third")) == len(KEYS)


def test_a_damaged_value_is_computed_again(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second")
    store(first)
    name = f"kvcache:1:{SPACE.hex()}:{KEYS[5].hex()}"
    server.client().setrange(name, 9000, b"damage")
    assert found(second) == 5
    assert not server.client().exists(name)
    store(second)
    assert found(opened("l1-redis", "third")) == len(KEYS)


def test_a_server_that_goes_costs_hits_and_comes_back(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second")
    store(first)
    server.kill()
    assert found(second) == 0
    assert found(first) == len(KEYS)  # L1 does not care
    store(second, keys_of("while it is away", 5))
    check(second, 5)
    server.start()
    second.front.clear()
    more = [keys_of(f"again {at}", 1) for at in range(10_000)]

    def back() -> bool:  # the breaker tries again after a second
        store(second, more.pop())
        return bool(server.client().dbsize())

    eventually(back, "it is asked again")


def test_a_server_that_hangs_stalls_nobody_and_keeps_no_slot(opened: Open, server: Server) -> None:
    first, second = opened("l1-redis", "first"), opened("l1-redis", "second", deadline_s=0.2)
    store(first)
    with server.stopped():
        assert found(second) == 0
        store(second)
        eventually(lambda: second.stats().pinned_slots == 0, "every slot comes back")
        check(second, len(KEYS))
    assert found(second) == len(KEYS)
