"""A stack over L1: matches are fetched with the right bytes, and every lease ends once."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from kvcache import LeaseError, Stack
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tiers.dram import DramTier


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack(DramTier(block_nbytes=PAGE, capacity=Size(16 * PAGE)), profile="test") as stack:
        yield stack
        assert stack.stats().pinned_slots == 0


def put(stack: Stack, keys: list[bytes], parent: bytes | None = None) -> int:
    with stack.reserve(keys, parent) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, PAGE)
        return len(lease)


def test_fetch_of_stored_blocks_returns_their_bytes(stack: Stack) -> None:
    keys = keys_of("a", 5)
    assert put(stack, keys[:3]) == 3
    future = stack.match(keys)
    assert future.done()  # L1 has the answer
    match = future.result()
    assert (match.keys, match.start, match.blocks) == (keys, 0, 3)
    assert match.held == keys[:3]
    with stack.fetch(match).result() as lease:
        assert list(lease.keys) == keys[:3]
        assert list(lease.positions) == [0, 1, 2]
        assert [bytes(view) for view in lease.views] == [block_of(key, PAGE) for key in keys[:3]]
        assert stack.stats().pinned_slots == 3


def test_match_starts_after_the_blocks_of_the_engine(stack: Stack) -> None:
    keys = keys_of("a", 4)
    put(stack, keys)
    match = stack.match(keys, 2).result()
    assert (match.blocks, match.held) == (2, keys[2:])
    assert stack.match(keys, 4).result().blocks == 0
    with stack.fetch(match).result() as lease:
        assert list(lease.keys) == keys[2:]


def test_fetch_after_a_removal_is_shorter_than_its_match(stack: Stack) -> None:
    keys = keys_of("a", 4)
    put(stack, keys)
    match = stack.match(keys).result()
    stack.front.remove([keys[2]])
    with stack.fetch(match).result() as lease:
        assert list(lease.keys) == keys[:2]
    stack.clear()
    with stack.fetch(match).result() as lease:
        assert not lease.keys


def test_clear_during_leases_keeps_their_bytes_and_publishes_nothing(stack: Stack) -> None:
    keys = keys_of("a", 4)
    put(stack, keys[:2])
    reading = stack.fetch(stack.match(keys).result()).result()
    filling = stack.reserve(keys[2:], keys[1])
    stack.clear()
    assert stack.stats().tiers[0].used_blocks == 0
    assert bytes(reading.views[0]) == block_of(keys[0], PAGE)
    filling.end()
    reading.end()
    assert stack.match(keys).result().blocks == 0


def test_lease_with_failed_keys_drops_them_from_later_matches(stack: Stack) -> None:
    keys = keys_of("a", 3)
    put(stack, keys)
    lease = stack.fetch(stack.match(keys).result()).result()
    lease.end(failed=[keys[1]])
    assert stack.match(keys).result().blocks == 1
    assert stack.stats().tiers[0].dropped_blocks == 1


def test_reserve_with_an_exception_publishes_nothing(stack: Stack) -> None:
    keys = keys_of("a", 3)
    with suppress(ZeroDivisionError), stack.reserve(keys):
        _ = 1 / 0
    assert stack.match(keys).result().blocks == 0


def test_lease_of_a_stack_ended_twice_raises(stack: Stack) -> None:
    lease = stack.reserve(keys_of("a", 1))
    lease.end()
    with pytest.raises(LeaseError, match="ended already"):
        lease.end()
    lease = stack.reserve(keys_of("b", 1))
    with pytest.raises(LeaseError, match="not in this lease"):
        lease.end(failed=[b"stranger"])
    assert not lease.has_ended
    lease.end()


def test_blocks_with_children_are_not_evicted(stack: Stack) -> None:
    keys = keys_of("a", 16)
    put(stack, keys[:8])
    put(stack, keys_of("b", 1))
    put(stack, keys[8:15], keys[7])
    stack.front.remove(keys[14:15])
    put(stack, keys_of("c", 3))
    assert stack.match(keys).result().blocks == 13


def test_close_twice_unmaps_the_slab_once() -> None:
    stack = Stack(DramTier(block_nbytes=PAGE, capacity=Size(PAGE)), profile="test")
    name = stack.front.slab.descriptor.name
    assert name in Path("/proc/self/maps").read_text()
    stack.close()
    stack.close()
    assert name not in Path("/proc/self/maps").read_text()


def test_threads_that_share_chains_fetch_the_right_bytes(stack: Stack) -> None:
    """Chains share heads and outgrow L1; every block that is fetched has the bytes of its key."""
    heads = [keys_of(f"head {at}", 4) for at in range(3)]
    chains = [heads[at % 3] + keys_of(f"tail {at}", 6) for at in range(12)]
    begin = threading.Barrier(8)

    def user(seed: int) -> int:
        choose, fetched = random.Random(seed), 0
        begin.wait()
        for _ in range(150):
            keys = choose.choice(chains)
            with stack.fetch(stack.match(keys).result()).result() as lease:
                for key, view in zip(lease.keys, lease.views, strict=True):
                    assert bytes(view) == block_of(key, PAGE)
                have = len(lease)
            fetched += have
            with (
                suppress(ZeroDivisionError),
                stack.reserve(keys[have:], keys[have - 1] if have else None) as filling,
            ):
                for key, view in zip(filling.keys, filling.views, strict=True):
                    view[:] = block_of(key, PAGE)
                _ = 1 / choose.randrange(4)
        return fetched

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(user, range(8))) > 0
    stack.front.index.check()  # type: ignore[attr-defined]
    tier = stack.stats().tiers[0]
    assert tier.stored_blocks - tier.evicted_blocks - tier.dropped_blocks == tier.used_blocks
    assert tier.evicted_blocks > 0
