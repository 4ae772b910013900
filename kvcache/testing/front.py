"""The contract of every front tier, as tests.

Invariant: after each test of a front tier, no slot is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvcache.testing.blocks import block_of, keys_of, run_in_threads
from kvcache.testing.tier import TierTests
from kvcache.tier import FrontTier, Lease, LeaseError


class FrontTierTests(TierTests):
    """The contract of ``kvcache.FrontTier``: a tier that lends its memory and evicts blocks.

    The fixture ``tier`` yields an empty tier of ``room_blocks`` slots, or a few more.
    """

    def chain(self, tier: FrontTier, name: str, count: int | None = None) -> list[bytes]:
        """Return the keys of a chain of ``count`` blocks; by default, one for each slot."""
        tier.slab.wait_populated()
        return keys_of(name, tier.stats().capacity_blocks if count is None else count)

    def write(self, lease: Lease) -> None:
        """Write the right blocks into the slots of a lease."""
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, self.block_nbytes)

    def check_views(self, lease: Lease) -> None:
        """Check that the slots of a lease have the right blocks."""
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(key, self.block_nbytes), "a slot has a wrong block"

    def fill(self, tier: FrontTier, keys: Sequence[bytes], parent: bytes | None = None) -> int:
        """Store a segment of a chain in place; return how many blocks got a slot."""
        with tier.reserve(keys, parent) as lease:
            self.write(lease)
        return len(lease)

    def check_idle(self, tier: FrontTier) -> None:
        """Check that no slot is pinned and the counts add up."""
        stats = tier.stats()
        assert stats.pinned_slots == 0
        removed = stats.evicted_blocks + stats.dropped_blocks
        assert stats.used_blocks == stats.stored_blocks - removed
        assert stats.used_blocks <= stats.populated_blocks <= stats.capacity_blocks

    def test_access_returns_the_length_of_the_held_prefix(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "access", 8)
        assert tier.access(chain) == 0
        self.fill(tier, chain[:6])
        assert [tier.access(chain), tier.access(chain, 4), tier.access(chain, 6)] == [6, 2, 0]
        tier.remove([chain[2]])
        assert [tier.access(chain), tier.access(chain, 3), tier.access(chain, 8)] == [2, 3, 0]
        stats = tier.stats()
        assert (stats.lookup_blocks, stats.hit_blocks) == (8 + 8 + 4 + 2 + 8 + 5, 6 + 2 + 2 + 3)

    def test_block_is_held_after_its_lease_ends(self, tier: FrontTier) -> None:
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

    def test_reserve_lends_only_absent_blocks(self, tier: FrontTier) -> None:
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

    def test_reserve_of_a_key_twice_lends_one_slot(self, tier: FrontTier) -> None:
        a, b = self.chain(tier, "reserved twice", 2)
        assert self.fill(tier, [a, b, a]) == 2
        self.check_load(tier, [a, b], [True, True])
        self.check_idle(tier)

    def test_key_twice_is_filled_once_and_read_at_each_position(self, tier: FrontTier) -> None:
        a, b, c = self.chain(tier, "read twice", 3)
        chain = [a, b, a, c]
        with tier.reserve_branches([(chain[:3], None), ([b, c], a)], [([c, a], b)]) as writer:
            assert (list(writer.keys), list(writer.positions)) == ([a, b, c], [0, 1, 4])
            with tier.pin_any(chain) as lent:
                assert list(lent.slots) == [writer.slots[at] for at in (0, 1, 0, 2)]
            self.write(writer)
        assert [tier.access(chain), tier.count_prefix(chain, 1)] == [4, 3]
        assert (tier.stats().lookup_blocks, tier.stats().hit_blocks) == (4, 4)
        for lend in (tier.pin, tier.pin_any):
            with lend(chain) as lease:
                assert (list(lease.keys), list(lease.positions)) == (chain, [0, 1, 2, 3])
                assert tier.stats().pinned_slots == 3
                self.check_views(lease)
        tier.mark_done(chain)
        tier.protect(chain, 1.0)
        tier.pin(chain).end(failed=[a])
        tier.remove([b, b])
        assert tier.contains(chain) == [False, False, False, True]
        self.check_idle(tier)

    def test_block_may_be_stored_before_its_parent(self, tier: FrontTier) -> None:
        chain, orphans = self.chain(tier, "late parent"), keys_of("no parent", 2)
        assert (self.fill(tier, chain[1:3], chain[0]), self.fill(tier, chain[:1])) == (2, 1)
        self.check_load(tier, chain[:4], [True] * 3 + [False])
        self.fill(tier, chain)
        lent = self.fill(tier, orphans, b"unknown parent")  # a full tier may decline them
        assert tier.contains(orphans) == [True] * lent + [False] * (2 - lent)
        self.check_idle(tier)

    def test_count_prefix_records_no_lookup(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "counted", 5)
        self.put(tier, [*chain[:2], *chain[3:]])
        assert [tier.count_prefix(chain, start) for start in (0, 1, 2, 3, 5)] == [2, 1, 0, 2, 0]
        assert tier.stats().lookup_blocks == 0

    def test_reserve_branches_lends_all_segments_in_one_lease(self, tier: FrontTier) -> None:
        chain, sides = self.chain(tier, "branches", 4), keys_of("sides", 4, 34)
        self.put(tier, [chain[0]])
        lease = tier.reserve_branches(
            [(chain[1:3], chain[0])],
            [([sides[0]], chain[0]), (sides[1:3], chain[2]), ([sides[3]], chain[3])],
        )
        assert list(lease.keys) == [*chain[1:3], *sides[:3]]  # chain[3] is not held
        assert list(lease.positions) == [0, 1, 2, 3, 4]
        assert tier.stats().pinned_slots == len(set(lease.slots)) == 5
        again = tier.reserve_branches([(chain, None)], [([sides[3]], chain[3])])
        assert list(again.keys) == [chain[3], sides[3]]
        assert list(again.positions) == [3, 4]
        self.write(again)
        again.end()
        self.write(lease)
        lease.end(failed=[sides[1]])
        self.check_load(tier, [*chain, *sides], [True] * 5 + [False, True, True])
        self.check_idle(tier)

    def test_side_blocks_are_evicted_before_their_chain(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "kept")
        count = len(chain) // 2
        sides = keys_of("evicted", count, 34)
        branches = [([side], parent) for side, parent in zip(sides, chain, strict=False)]
        with tier.reserve_branches([(chain[:count], None)], branches) as lease:
            self.write(lease)
            assert len(lease) == 2 * count
        for new in keys_of("new", count):
            self.fill(tier, [new])
            held = zip(tier.contains(chain[:count]), tier.contains(sides), strict=True)
            assert all(parent or not side for parent, side in held)
        assert sum(tier.contains([*chain[:count], *sides])) <= count

    def test_pin_stops_at_the_first_absent_block(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "hole", 5)
        self.put(tier, [*chain[:2], *chain[3:]])
        with tier.pin(chain) as lease:
            assert (list(lease.keys), list(lease.positions)) == (chain[:2], [0, 1])
            assert tier.stats().pinned_slots == 2
            self.check_views(lease)
        assert len(tier.pin(chain[2:])) == 0
        self.check_idle(tier)

    def test_lease_with_an_exception_fails_all_keys(self, tier: FrontTier) -> None:
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

    def test_lease_with_failed_keys_keeps_the_others(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "partly", 5)
        lease = tier.reserve(chain)
        self.write(lease)
        lease.end(failed=[chain[1], chain[3]])
        held = [True, False, True, False, True]
        self.check_load(tier, chain, held)
        tier.pin(chain).end(failed=iter(chain[:1]))
        self.check_load(tier, chain, [False, *held[1:]])
        self.check_idle(tier)

    def test_lease_end_twice_raises(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "once", 3)
        for lend in (tier.reserve, tier.pin, tier.pin_any):
            lease = lend(chain[:2])
            with pytest.raises(LeaseError):
                lease.end(failed=[chain[2]])  # a key of another lease does not end it
            assert tier.stats().pinned_slots == 2
            self.write(lease)
            lease.end()
            with pytest.raises(LeaseError):
                lease.end()
        with tier.pin(chain) as lease:
            lease.end()
        self.check_load(tier, chain, [True, True, False])
        self.check_idle(tier)

    def test_reserve_in_threads_lends_each_block_once(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "shared", 8)
        leases: list[Lease] = []
        run_in_threads(4, lambda _: leases.append(tier.reserve(chain)))
        assert sorted(key for lease in leases for key in lease.keys) == sorted(chain)
        for lease in leases:
            self.write(lease)
            lease.end()
        self.check_load(tier, chain, [True] * 8)
        self.check_idle(tier)

    def test_reserve_without_room_lends_the_leading_blocks(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "short")
        with tier.reserve([*chain, *keys_of("too much", 5)]) as lease:
            assert list(lease.keys) == chain
            assert tier.stats().declined_blocks == 5
            assert len(tier.reserve(keys_of("none left", 1))) == 0
            assert tier.store(keys_of("none left", 1), self.blocks(chain[:1])) == [False]
            self.write(lease)
        self.check_load(tier, chain, [True] * len(chain))
        self.check_idle(tier)

    def test_pinned_block_is_not_evicted(self, tier: FrontTier) -> None:
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

    def test_eviction_starts_at_the_tail_of_a_chain(self, tier: FrontTier) -> None:
        old, new = self.chain(tier, "old"), self.chain(tier, "new")
        self.fill(tier, old)
        for count in (1, 2, 3, len(old)):
            self.fill(tier, new[:count])
            held = tier.contains(old)
            assert sorted(held, reverse=True) == held, "a block was evicted before its child"
        assert all(tier.contains(new))
        assert self.fill(tier, keys_of("more", 3), new[-1]) == 0, "a chain evicted its own blocks"
        self.check_idle(tier)

    def test_hints_neither_remove_nor_keep_blocks(self, tier: FrontTier) -> None:
        chain, new = self.chain(tier, "hint"), self.chain(tier, "new")
        self.fill(tier, chain)
        tier.mark_done(keys_of("unknown", 2))
        tier.protect(keys_of("unknown", 2), 60.0)
        tier.protect(chain, 1e6)
        tier.mark_done(chain[2:])
        self.check_load(tier, chain, [True] * len(chain))
        with tier.pin(chain[:4]) as lease:
            tier.mark_done(chain)
            assert self.fill(tier, new) == len(chain) - 4, (
                "a protected block stayed, or a pinned one was evicted"
            )
            self.check_views(lease)
        self.check_load(tier, chain[:4], [True] * 4)
        self.check_idle(tier)

    def test_dropped_block_under_a_lease_keeps_its_bytes(self, tier: FrontTier) -> None:
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

    def test_clear_keeps_the_slots_of_leases(self, tier: FrontTier) -> None:
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

    def test_pin_any_lends_all_held_and_filling_blocks(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "hold", 7)
        self.put(tier, [*chain[:2], chain[3]])
        writer = tier.reserve(chain[5:6])
        lease = tier.pin_any(chain)
        assert list(lease.keys) == [*chain[:2], chain[3], chain[5]]
        assert list(lease.positions) == [0, 1, 3, 5]
        assert list(lease.slots[3:]) == list(writer.slots)
        assert tier.stats().pinned_slots == 4
        assert tier.contains(chain[5:6]) == [False], "pin_any published a block"
        self.write(writer)
        writer.end()
        self.check_views(lease)
        assert tier.stats().pinned_slots == 4
        lease.end()
        assert len(tier.pin_any(chain[4:5])) == len(tier.pin_any([])) == 0
        self.check_load(tier, chain, [True, True, False, True, False, True, False])
        self.check_idle(tier)

    def test_block_under_pin_any_is_not_evicted(self, tier: FrontTier) -> None:
        old, new = self.chain(tier, "old"), self.chain(tier, "new")
        half = len(old) // 2
        self.fill(tier, old[:half])
        writer = tier.reserve(old[half : half + 1], old[half - 1])
        with tier.pin_any(old) as one, tier.pin_any(old[half:]) as two:
            self.write(writer)
            writer.end()
            assert self.fill(tier, new) == len(old) - half - 1
            self.check_views(one)
            one.end()
            assert tier.stats().pinned_slots == 1
            self.check_views(two)
        self.check_load(tier, old[: half + 1], [True] * (half + 1))
        assert self.fill(tier, keys_of("newer", len(old))) == len(old)
        self.check_idle(tier)

    def test_pin_any_that_ends_first_leaves_filling_blocks(self, tier: FrontTier) -> None:
        chain, new = self.chain(tier, "filled on", 3), self.chain(tier, "new")
        writer = tier.reserve(chain)
        tier.pin_any(chain).end()
        assert tier.stats().pinned_slots == 3
        assert self.fill(tier, new) == len(new) - 3
        self.write(writer)
        writer.end()
        self.check_load(tier, chain, [True] * 3)
        self.check_idle(tier)

    def test_pin_any_of_a_failed_block_frees_its_slot_at_the_end(self, tier: FrontTier) -> None:
        chain, new = self.chain(tier, "not filled", 4), self.chain(tier, "new")
        self.fill(tier, chain[:1])
        writer = tier.reserve(chain[1:], chain[0])
        lease = tier.pin_any(chain)
        self.write(writer)
        writer.end(failed=chain[2:3])
        assert tier.contains(chain) == [True, True, False, True]
        assert self.fill(tier, new) == len(new) - 4, "a slot under lease was lent again"
        self.check_views(lease)
        assert tier.stats().pinned_slots == 4
        lease.end(failed=chain[1:3])  # a held block, and the failed one
        self.check_load(tier, chain, [True, False, False, True])
        assert self.fill(tier, keys_of("newer", len(new))) == len(new)
        assert (tier.stats().failed_blocks, tier.stats().dropped_blocks) == (1, 1)
        self.check_idle(tier)

    def test_clear_keeps_the_slots_under_pin_any(self, tier: FrontTier) -> None:
        held, filling, new = keys_of("held", 2), keys_of("filling", 2), self.chain(tier, "new")
        self.fill(tier, held)
        writer = tier.reserve(filling)
        lease = tier.pin_any([*held, *filling])
        tier.clear()
        assert len(tier.pin_any([*held, *filling])) == 0
        self.write(writer)
        writer.end()
        assert tier.contains([*held, *filling]) == [False] * 4
        assert self.fill(tier, new) == len(new) - 4
        self.check_views(lease)
        lease.end(failed=held[:1])
        assert self.fill(tier, keys_of("newer", len(new))) == len(new)
        assert tier.stats().pinned_slots == 0

    def test_stats_count_lent_slots(self, tier: FrontTier) -> None:
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
