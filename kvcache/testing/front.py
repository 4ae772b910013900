"""What a front tier promises as well, as tests.

Always true: a front tier has no slot pinned when a test of it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvcache.testing.blocks import block_of, keys_of, run_in_threads
from kvcache.testing.tier import TierTests
from kvcache.tier import FrontTier, Lease, LeaseError


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

    def fill(self, tier: FrontTier, keys: Sequence[bytes], parent: bytes | None = None) -> int:
        """Store a stretch of a chain in place; give how many blocks got a slot."""
        with tier.reserve(keys, parent) as lease:
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
        for lend in (tier.reserve, tier.pin, tier.pin_any):
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
        run_in_threads(4, lambda _: leases.append(tier.reserve(chain)))
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

    def test_hints_take_nothing_away_and_promise_nothing(self, tier: FrontTier) -> None:
        chain, new = self.chain(tier, "hint"), self.chain(tier, "new")
        self.fill(tier, chain)
        tier.mark_done(keys_of("never there", 2))
        tier.protect(keys_of("never there", 2), 60.0)
        tier.protect(chain, 1e6)
        tier.mark_done(chain[2:])
        self.check_load(tier, chain, [True] * len(chain))
        with tier.pin(chain[:4]) as lease:
            tier.mark_done(chain)
            assert self.fill(tier, new) == len(chain) - 4, "kept for ever, or pinned and let go"
            self.check_views(lease)
        self.check_load(tier, chain[:4], [True] * 4)
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

    def test_hold_lends_what_there_is_wherever_it_is(self, tier: FrontTier) -> None:
        chain = self.chain(tier, "hold", 7)
        self.put(tier, [*chain[:2], chain[3]])
        writer = tier.reserve(chain[5:6])
        lease = tier.pin_any(chain)
        assert list(lease.keys) == [*chain[:2], chain[3], chain[5]]
        assert list(lease.positions) == [0, 1, 3, 5]
        assert list(lease.slots[3:]) == list(writer.slots)
        assert tier.stats().pinned_slots == 4
        assert tier.contains(chain[5:6]) == [False], "a hold publishes nothing"
        self.write(writer)
        writer.end()
        self.check_views(lease)
        assert tier.stats().pinned_slots == 4
        lease.end()
        assert len(tier.pin_any(chain[4:5])) == len(tier.pin_any([])) == 0
        self.check_load(tier, chain, [True, True, False, True, False, True, False])
        self.check_idle(tier)

    def test_what_is_held_on_to_stays(self, tier: FrontTier) -> None:
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

    def test_a_hold_that_ends_first_leaves_a_block_to_who_fills_it(self, tier: FrontTier) -> None:
        chain, new = self.chain(tier, "filled on", 3), self.chain(tier, "new")
        writer = tier.reserve(chain)
        tier.pin_any(chain).end()
        assert tier.stats().pinned_slots == 3
        assert self.fill(tier, new) == len(new) - 3
        self.write(writer)
        writer.end()
        self.check_load(tier, chain, [True] * 3)
        self.check_idle(tier)

    def test_a_hold_of_what_could_not_be_filled(self, tier: FrontTier) -> None:
        chain, new = self.chain(tier, "not filled", 4), self.chain(tier, "new")
        self.fill(tier, chain[:1])
        writer = tier.reserve(chain[1:], chain[0])
        lease = tier.pin_any(chain)
        self.write(writer)
        writer.end(failed=chain[2:3])
        assert tier.contains(chain) == [True, True, False, True]
        assert self.fill(tier, new) == len(new) - 4, "a slot was given out that is held"
        self.check_views(lease)
        assert tier.stats().pinned_slots == 4
        lease.end(failed=chain[1:3])  # one that is there, and the one that is not
        self.check_load(tier, chain, [True, False, False, True])
        assert self.fill(tier, keys_of("newer", len(new))) == len(new)
        assert (tier.stats().failed_blocks, tier.stats().dropped_blocks) == (1, 1)
        self.check_idle(tier)

    def test_clear_takes_nothing_from_a_hold(self, tier: FrontTier) -> None:
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
