"""What a tier promises, as tests: inherit a class, give it a ``tier`` fixture. Needs pytest.

::

    class TestMyTier(TierTests):
        @pytest.fixture
        def tier(self):
            with closing(MyTier(block_nbytes=self.block_nbytes)) as tier:
                yield tier

Always true here:

* A block's bytes are made from its key, so a block that comes back under another key is seen.
* A front tier has no slot pinned when a test of it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, shake_128

import pytest

from kvcache.tier import FrontTier, Lease, LeaseError, Tier

AFTER_BLOCK = 64  # bytes of a buffer behind the block's, which no tier may touch


def keys_of(name: str, count: int, nbytes: int = 32) -> list[bytes]:
    """``count`` keys of ``nbytes`` bytes (at most 64) that no other name gives."""
    return [blake2b(f"{name}/{at}".encode(), digest_size=nbytes).digest() for at in range(count)]


def block_of(key: bytes, nbytes: int) -> bytes:
    """The ``nbytes`` bytes that the tests keep under ``key``."""
    return shake_128(key).digest(nbytes)


class TierTests:
    """Every tier: opaque blocks under opaque keys, answered per key and in order.

    The fixture ``tier`` gives an empty one with room for ``room_blocks`` blocks of ``block_nbytes``
    bytes, and closes it.
    """

    block_nbytes: int = 4096
    room_blocks: int = 64

    def blocks(self, keys: Sequence[bytes]) -> list[memoryview]:
        """The blocks that belong to ``keys``, read-only."""
        return [memoryview(block_of(key, self.block_nbytes)) for key in keys]

    def put(self, tier: Tier, keys: Sequence[bytes]) -> None:
        """Store the blocks that belong to ``keys``."""
        assert tier.store(keys, self.blocks(keys)) == [True] * len(keys)

    def check_load(self, tier: Tier, keys: Sequence[bytes], held: Sequence[bool]) -> None:
        """Load ``keys``: exactly those ``held`` come, whole, and no other byte is written."""
        clean = b"\xa5" * (self.block_nbytes + AFTER_BLOCK)
        into = [bytearray(clean) for _ in keys]
        assert tier.load(keys, [memoryview(buffer) for buffer in into]) == [
            self.block_nbytes if there else 0 for there in held
        ]
        for key, there, buffer in zip(keys, held, into, strict=True):
            block = block_of(key, self.block_nbytes) if there else clean[: self.block_nbytes]
            assert buffer[: self.block_nbytes] == block, "these are not the bytes that belong here"
            assert buffer[self.block_nbytes :] == clean[self.block_nbytes :], "written past a block"

    def test_blocks_come_back_as_they_were(self, tier: Tier) -> None:
        keys = keys_of("back", 5)
        assert tier.contains(keys) == [False] * 5
        self.check_load(tier, keys, [False] * 5)
        self.put(tier, keys)
        assert tier.contains(keys) == [True] * 5
        self.check_load(tier, keys, [True] * 5)
        self.check_load(tier, keys, [True] * 5)  # reading uses nothing up

    def test_answers_are_per_key_and_in_order(self, tier: Tier) -> None:
        keys = keys_of("order", 6)
        self.put(tier, keys[1::2])
        held = [False, True] * 3
        assert tier.contains(keys) == held
        self.check_load(tier, keys, held)
        assert tier.contains(tuple(reversed(keys))) == held[::-1]
        self.check_load(tier, tuple(reversed(keys)), held[::-1])

    def test_a_held_key_stays_as_it_is(self, tier: Tier) -> None:
        keys = keys_of("again", 3)
        self.put(tier, keys[:2])
        other = memoryview(bytes(self.block_nbytes))
        tier.store(keys[:2], [other, other])
        self.check_load(tier, keys, [True, True, False])
        self.put(tier, keys)  # held ones and a new one in one batch
        self.check_load(tier, keys, [True] * 3)

    def test_empty_batches(self, tier: Tier) -> None:
        assert tier.contains([]) == []
        assert tier.load([], []) == []
        assert tier.store([], []) == []
        tier.remove([])

    def test_remove_forgets_these_and_no_others(self, tier: Tier) -> None:
        keys = keys_of("gone", 6)
        self.put(tier, keys[:4])
        tier.remove(keys[1:3])
        self.check_load(tier, keys, [True, False, False, True, False, False])
        tier.remove(keys)  # some held, some gone, some never there
        assert tier.contains(keys) == [False] * 6
        self.put(tier, keys)

    def test_bytes_are_copied_in_and_out(self, tier: Tier) -> None:
        keys = keys_of("copy", 1)
        buffer = bytearray(block_of(keys[0], self.block_nbytes))
        tier.store(keys, [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        self.check_load(tier, keys, [True])
        tier.load(keys, [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        self.check_load(tier, keys, [True])

    def test_keys_of_any_length_and_any_bytes(self, tier: Tier) -> None:
        keys = [keys_of("length", 1, nbytes)[0] for nbytes in (16, 32, 64)]
        keys += [keys[2][:16], keys[2][:32]]  # where one ends, the other goes on
        keys += [bytes(16), bytes(32), bytes(64), b"\xff" * 32, b"../" * 10 + b"\n\0"]
        for at, key in enumerate(keys):
            assert tier.contains([key]) == [False], "two keys were taken for one"
            self.put(tier, [key])
            self.check_load(tier, keys[: at + 1], [True] * (at + 1))

    def test_a_key_twice_in_a_batch(self, tier: Tier) -> None:
        key, other = keys_of("twice", 2)
        twice = [key, other, key]
        zeros = memoryview(bytes(self.block_nbytes))
        assert tier.store(twice, [*self.blocks(twice[:2]), zeros]) == [True] * 3
        assert tier.contains(twice) == [True] * 3
        self.check_load(tier, twice, [True] * 3)  # the first stayed
        tier.remove([key, key])
        assert tier.contains(twice) == [False, True, False]

    def test_as_many_blocks_as_there_is_room_for(self, tier: Tier) -> None:
        keys = keys_of("many", self.room_blocks)
        self.put(tier, keys)
        assert tier.contains(keys) == [True] * len(keys)
        self.check_load(tier, keys, [True] * len(keys))

    def test_closing_twice(self, tier: Tier) -> None:
        self.put(tier, keys_of("close", 1))
        tier.close()
        tier.close()

    def test_several_threads(self, tier: Tier) -> None:
        shared, threads = keys_of("threads", 6), 4

        def work(thread: int) -> None:
            own = keys_of(f"thread {thread}", 2)
            for turn in range(20):
                self.put(tier, own)
                self.check_load(tier, own, [True] * 2)
                tier.store(shared, self.blocks(shared))
                tier.remove([shared[(thread + turn) % len(shared)]])
                for key in shared:
                    buffer = bytearray(self.block_nbytes)
                    if tier.load([key], [memoryview(buffer)])[0]:
                        assert buffer == block_of(key, self.block_nbytes), "another key's bytes"
                tier.remove(own)
                assert tier.contains(own) == [False] * 2

        together(threads, work)


class FrontTierTests(TierTests):
    """A front tier as well: it lends its memory under leases, and makes room by forgetting.

    The fixture ``tier`` gives an empty one of ``room_blocks`` slots, or a few more.
    """

    def chain(self, tier: FrontTier, name: str, count: int | None = None) -> list[bytes]:
        """Keys of a chain of ``count`` blocks, as many as the tier has slots when not said."""
        tier.slab.wait_populated()
        return keys_of(name, tier.stats().capacity_blocks if count is None else count)

    def write(self, lease: Lease) -> None:
        """Write into a lease's slots what belongs there."""
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, self.block_nbytes)

    def check_views(self, lease: Lease) -> None:
        """See in a lease's slots what belongs there."""
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(key, self.block_nbytes), "these bytes do not belong here"

    def fill(self, tier: FrontTier, keys: Sequence[bytes], after: bytes | None = None) -> int:
        """Store a stretch of a chain in place; give how many blocks got a slot."""
        with tier.reserve(keys, after) as lease:
            self.write(lease)
        return len(lease)

    def check_idle(self, tier: FrontTier) -> None:
        """Nothing is in flight: no slot is pinned, and the counts add up."""
        stats = tier.stats()
        assert stats.pinned_slots == 0
        left = stats.evicted_blocks + stats.dropped_blocks
        assert stats.used_blocks == stats.stored_blocks - left
        assert stats.used_blocks <= stats.populated_blocks <= stats.capacity_blocks

    def test_access_says_how_much_of_a_prefix_is_held(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "access", 8)
        assert tier.access(chain) == 0
        self.fill(tier, chain[:6])
        assert [tier.access(chain), tier.access(chain, 4), tier.access(chain, 6)] == [6, 2, 0]
        tier.remove([chain[2]])
        assert [tier.access(chain), tier.access(chain, 3), tier.access(chain, 8)] == [2, 3, 0]
        stats = tier.stats()
        assert (stats.lookup_blocks, stats.hit_blocks) == (8 + 8 + 4 + 2 + 8 + 5, 6 + 2 + 2 + 3)

    def test_a_block_is_held_once_its_lease_ends_well(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "publish", 4)
        lease = tier.reserve(chain)
        assert (list(lease.keys), list(lease.positions)) == (chain, [0, 1, 2, 3])
        assert len(set(lease.slots)) == len(lease) == tier.stats().pinned_slots == 4
        assert [len(view) for view in lease.views] == [self.block_nbytes] * 4
        self.write(lease)
        assert tier.contains(chain) == [False] * 4
        assert tier.access(chain) == len(tier.pin(chain)) == 0
        lease.end()
        assert tier.contains(chain) == [True] * 4
        assert tier.access(chain) == 4
        self.check_load(tier, chain, [True] * 4)
        self.check_idle(tier)

    def test_only_what_is_missing_is_lent(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "missing", 6)
        self.put(tier, [chain[1]])
        first = tier.reserve(chain[:3])
        assert list(first.positions) == [0, 2]
        second = tier.reserve(chain)
        assert (list(second.keys), list(second.positions)) == (chain[3:], [3, 4, 5])
        assert not set(first.slots) & set(second.slots)
        assert len(tier.reserve(chain)) == 0
        for lease in (second, first):
            self.write(lease)
            lease.end()
        self.check_load(tier, chain, [True] * 6)
        self.check_idle(tier)

    def test_a_key_twice_in_a_reserve(self, tier: FrontTier) -> None:
        a, b = self.chain(tier, "reserved twice", 2)
        assert self.fill(tier, [a, b, a]) == 2
        self.check_load(tier, [a, b], [True, True])
        self.check_idle(tier)

    def test_pin_lends_up_to_the_first_hole(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "hole", 5)
        self.put(tier, [*chain[:2], *chain[3:]])
        with tier.pin(chain) as lease:
            assert (list(lease.keys), list(lease.positions)) == (chain[:2], [0, 1])
            assert tier.stats().pinned_slots == 2
            self.check_views(lease)
        assert len(tier.pin(chain[2:])) == 0
        self.check_idle(tier)

    def test_an_exception_is_a_failure(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "exception", 3)
        with pytest.raises(ZeroDivisionError), tier.reserve(chain):
            raise ZeroDivisionError
        assert tier.contains(chain) == [False] * 3
        assert self.fill(tier, chain) == 3
        with pytest.raises(ZeroDivisionError), tier.pin(chain[:2]):
            raise ZeroDivisionError
        assert tier.contains(chain) == [False, False, True]
        assert (tier.stats().failed_blocks, tier.stats().dropped_blocks) == (3, 2)
        self.check_idle(tier)

    def test_what_failed_is_given_up_alone(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "partly", 5)
        lease = tier.reserve(chain)
        self.write(lease)
        lease.end(failed=[chain[1], chain[3]])
        held = [True, False, True, False, True]
        self.check_load(tier, chain, held)
        tier.pin(chain).end(failed=iter(chain[:1]))
        self.check_load(tier, chain, [False, *held[1:]])
        self.check_idle(tier)

    def test_a_lease_ends_exactly_once(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "once", 3)
        for lend in (tier.reserve, tier.pin):
            lease = lend(chain[:2])
            with pytest.raises(LeaseError):
                lease.end(failed=[chain[2]])  # not one of its keys: it has not ended
            assert tier.stats().pinned_slots == 2
            self.write(lease)
            lease.end()
            with pytest.raises(LeaseError):
                lease.end()
        with tier.pin(chain) as lease:
            lease.end()
        self.check_load(tier, chain, [True, True, False])
        self.check_idle(tier)

    def test_of_several_threads_one_fills_a_block(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "shared", 8)
        leases: list[Lease] = []
        together(4, lambda _: leases.append(tier.reserve(chain)))
        assert sorted(key for lease in leases for key in lease.keys) == sorted(chain)
        for lease in leases:
            self.write(lease)
            lease.end()
        self.check_load(tier, chain, [True] * 8)
        self.check_idle(tier)

    def test_a_lease_is_shorter_when_there_is_no_room(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "short")
        with tier.reserve([*chain, *keys_of("too much", 5)]) as lease:
            assert list(lease.keys) == chain
            assert tier.stats().declined_blocks == 5
            assert len(tier.reserve(keys_of("none left", 1))) == 0
            assert tier.store(keys_of("none left", 1), self.blocks(chain[:1])) == [False]
            self.write(lease)
        self.check_load(tier, chain, [True] * len(chain))
        self.check_idle(tier)

    def test_what_is_pinned_stays(self, tier: FrontTier) -> None:
        old, new = self.chain(tier, "old"), self.chain(tier, "new")
        half = len(old) // 2
        self.fill(tier, old)
        with tier.pin(old[:half]) as one, tier.pin(old[: half + 1]) as two:
            assert self.fill(tier, new) == len(old) - half - 1
            assert len(tier.reserve(keys_of("more", 1), new[-1])) == 0
            self.check_views(one)
            self.check_views(two)
            one.end()
            self.check_views(two)
            assert tier.stats().pinned_slots == half + 1
        self.check_load(tier, old[: half + 1], [True] * (half + 1))
        self.check_idle(tier)

    def test_a_chain_loses_its_tail_first(self, tier: FrontTier) -> None:
        old, new = self.chain(tier, "old"), self.chain(tier, "new")
        self.fill(tier, old)
        for count in (1, 2, 3, len(old)):
            self.fill(tier, new[:count])
            held = tier.contains(old)
            assert sorted(held, reverse=True) == held, "a block left before what continues it"
        assert all(tier.contains(new))
        assert self.fill(tier, keys_of("more", 3), new[-1]) == 0, "a chain made room for itself"
        self.check_idle(tier)

    def test_a_dropped_block_is_read_to_the_end(self, tier: FrontTier) -> None:
        old, new = self.chain(tier, "old"), self.chain(tier, "new")
        self.fill(tier, old[:4])
        with tier.pin(old[:4]) as reader:
            tier.pin(old[:2]).end(failed=old[:2])
            tier.remove(old[2:3])
            assert tier.contains(old[:4]) == [False] * 3 + [True]
            assert self.fill(tier, new) == len(new) - 4
            self.check_views(reader)
        assert self.fill(tier, keys_of("newer", len(new))) == len(new)
        self.check_idle(tier)

    def test_clear_takes_nothing_from_a_lease(self, tier: FrontTier) -> None:
        held, filling, new = keys_of("held", 3), keys_of("filling", 3), self.chain(tier, "new")
        self.fill(tier, held)
        reader, writer = tier.pin(held), tier.reserve(filling)
        tier.clear()
        assert tier.contains([*held, *filling]) == [False] * 6
        assert self.fill(tier, new) == len(new) - 6
        self.check_views(reader)
        self.write(writer)
        writer.end()
        reader.end(failed=held[:1])
        assert tier.contains([*held, *filling]) == [False] * 6
        assert self.fill(tier, keys_of("newer", len(new))) == len(new)
        assert tier.stats().pinned_slots == 0

    def test_stats_say_what_is_lent(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "stats")
        self.fill(tier, chain)
        tier.remove(chain[-3:])
        with tier.pin(chain[:2]), tier.pin(chain[:1]), tier.reserve(keys_of("filling", 1)):
            stats = tier.stats()
            assert (stats.pinned_slots, stats.used_blocks) == (3, len(chain) - 2)
        stats = tier.stats()
        assert (stats.stored_blocks, stats.dropped_blocks) == (len(chain) + 1, 3)
        assert stats.block_nbytes == self.block_nbytes == tier.block_nbytes
        self.check_idle(tier)


def together(threads: int, work: Callable[[int], None]) -> None:
    """Run ``work(0) ... work(threads - 1)`` in as many threads at once; raise what one raised."""
    start = threading.Barrier(threads)

    def begin(thread: int) -> None:
        start.wait()
        work(thread)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(begin, range(threads)))
