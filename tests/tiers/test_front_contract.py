"""FrontTierTests: each of its tests fails on some faulty front tier.

A wrong tier is L1 with one thing changed; test_dram.py shows that L1 itself passes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import pytest

from kvcache.keys import Branch
from kvcache.sizes import Size
from kvcache.testing import FrontTierTests, TierTests
from kvcache.tier import Lease, TierStats
from kvcache.tiers.dram import DramTier
from tests.support.contract_runs import failing_tests, suite_test_names

NBYTES = FrontTierTests.block_nbytes
ROOM = FrontTierTests.room_blocks


class WrongDram(DramTier):
    """A correct tier; each subclass has one fault."""

    def __init__(self) -> None:
        super().__init__(block_nbytes=NBYTES, capacity=Size(ROOM * NBYTES))


class AccessIgnoresStart(WrongDram):
    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        return super().access(chain, 0)


class HeldWhileFilling(WrongDram):
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.index.ready() or key in self.index.filling() for key in keys]


class LendsWhatItHolds(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        self.remove(keys)
        return super().reserve(keys, parent)


class PositionsAreCounted(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        lease = super().reserve(keys, parent)
        lease.positions = range(len(lease))
        return lease


class PinsPastAHole(WrongDram):
    def pin(self, keys: Sequence[bytes]) -> Lease:
        return super().pin([key for key in keys if self.contains([key])[0]])


class PublishesFailures(WrongDram):
    def _publish(self, lease: Lease, failed: frozenset[bytes]) -> None:
        super()._publish(lease, frozenset())


class FailsAll(WrongDram):
    def _publish(self, lease: Lease, failed: frozenset[bytes]) -> None:
        super()._publish(lease, frozenset(lease.keys) if failed else failed)


class KeepsWhatReadersDistrust(WrongDram):
    def _release(self, lease: Lease, failed: frozenset[bytes]) -> None:
        super()._release(lease, frozenset())


class DoneIsRemoved(WrongDram):
    def mark_done(self, keys: Sequence[bytes]) -> None:
        self.remove(keys)


class KeepsForEver(WrongDram):
    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        self.pin(keys)


class LeaseThatEndsOften(Lease):
    def end(self, failed: Iterable[bytes] = ()) -> None:
        if not self.has_ended:
            super().end(failed)


class EndsOften(WrongDram):
    def pin(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin(keys)
        return LeaseThatEndsOften(
            lease.keys, lease.slots, lease.positions, self._view, self._release
        )


class LendsWhatIsBeingFilled(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        lease = super().reserve(keys, parent)
        if lease.keys or all(self.contains(keys)):
            return lease
        return Lease(keys, range(len(keys)), range(len(keys)), self._view, lambda lease, bad: None)


class AllOrNothing(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        return super().reserve(keys if len(keys) <= ROOM else keys[:0], parent)


class NeverForgets(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        free = ROOM - self.stats().used_blocks
        return super().reserve(keys[:free], parent)


class ForgetsPins(WrongDram):
    def pin(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin(keys)
        with self.lock:
            self.index.unpin(lease.slots)
        return Lease(lease.keys, lease.slots, lease.positions, self._view, self._forget_pins)

    def _forget_pins(self, lease: Lease, failed: frozenset[bytes]) -> None:
        self.remove(list(failed))


class HeadFirst(WrongDram):
    """Evicts the head of a chain before its tail, and a chain that is being continued."""

    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        held = list(self.index.ready())
        if len(held) == ROOM:
            self.remove(held[: len(keys)])
        return super().reserve(keys, parent)


class DropFreesTheSlot(WrongDram):
    """Lends the slot of a dropped block that is still being read."""

    def remove(self, keys: Sequence[bytes]) -> None:
        with self.lock:
            for key in keys:
                if (slot := self.index.ready().get(key)) is not None:
                    self.index.pins.pop(slot, None)
        super().remove(keys)


class ClearLeavesWhatIsFilling(WrongDram):
    def clear(self) -> None:
        with self.lock:
            self.index.drop(list(self.index.ready()))


class CountsAreLate(WrongDram):
    def stats(self) -> TierStats:
        stats = super().stats()
        return dataclasses.replace(stats, stored_blocks=max(0, stats.stored_blocks - 1))


class RefusesAKeyTwice(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        if len(set(keys)) < len(keys):
            raise KeyError(keys[0])
        return super().reserve(keys, parent)


class PinsAKeyOnce(WrongDram):
    def pin(self, keys: Sequence[bytes]) -> Lease:
        return super().pin(list(dict.fromkeys(keys)))


class PinsAnyKeyOnce(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return super().pin_any(list(dict.fromkeys(keys)))


class AccessCountsAKeyOnce(WrongDram):
    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        return super().access(list(dict.fromkeys(chain)), start)


class BranchesLendAKeyTwice(WrongDram):
    def reserve_branches(self, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> Lease:
        lease = super().reserve_branches(chains, sides)
        at = len(lease)
        twice = [*lease.keys, *lease.keys[:1]], [*lease.slots, *lease.slots[:1]]
        return Lease(*twice, [*lease.positions, at], self._view, lambda _, bad: lease.end(bad))


class NeedsTheParent(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        is_known = parent is None or self.contains([parent])[0]
        return super().reserve(keys if is_known else [], parent)


class RaisesForAnUnknownParent(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        if parent is not None and len(parent) < 32:
            raise KeyError(parent)
        return super().reserve(keys, parent)


class HoldsUpToAHole(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return self.pin(keys)


class HoldsWhatIsReady(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return super().pin_any([key for key in keys if self.contains([key])[0]])


class PinAnyPublishes(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        with self.lock:
            self.index.publish([s for s in lease.slots if self._is_filling(s)])
        return lease

    def _is_filling(self, slot: int) -> bool:
        return slot in self.index.filling().values()


class ForgetsPinAny(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        with self.lock:
            self.index.unpin(lease.slots)
        return Lease(lease.keys, lease.slots, lease.positions, self._view, lambda lease, bad: None)


class PinAnyEndsOften(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        return LeaseThatEndsOften(
            lease.keys, lease.slots, lease.positions, self._view, self._release
        )


class PinAnyNeverEnds(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        return Lease(lease.keys, lease.slots, lease.positions, self._view, lambda lease, bad: None)


class PinAnyFreesFillingSlots(PinAnyPublishes):
    """The end of ``pin_any`` frees the slot of a block that is being filled."""

    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return WrongDram.pin_any(self, keys)

    def _release(self, lease: Lease, failed: frozenset[bytes]) -> None:
        filling = [slot for slot in lease.slots if self._is_filling(slot)]
        with self.lock:
            self.index.publish(filling, lease.keys)
        super()._release(lease, failed)


class FailureFreesWhatIsHeld(WrongDram):
    def _publish(self, lease: Lease, failed: frozenset[bytes]) -> None:
        with self.lock:
            for key, slot in zip(lease.keys, lease.slots, strict=True):
                if key in failed:
                    self.index.pins.pop(slot, None)
        super()._publish(lease, failed)


class ClearFreesEverySlot(WrongDram):
    def clear(self) -> None:
        with self.lock:
            self.index.pins.clear()
        super().clear()


class CountsPrefixesAsLookups(WrongDram):
    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int:
        return self.access(chain, start)


class LendsToSidesWithoutAChain(WrongDram):
    def reserve_branches(self, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> Lease:
        return super().reserve_branches([*chains, *sides])


class RemovesChainsForNewBlocks(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        self.remove([key for key in self.index.ready() if len(key) == 32])
        return super().reserve(keys, parent)


WRONG_FRONTS: dict[type[WrongDram], set[str]] = {
    AccessIgnoresStart: {"test_access_returns_the_length_of_the_held_prefix"},
    HeldWhileFilling: {"test_block_is_held_after_its_lease_ends"},
    LendsWhatItHolds: {"test_reserve_lends_only_absent_blocks"},
    PositionsAreCounted: {"test_reserve_lends_only_absent_blocks"},
    PinsPastAHole: {"test_pin_stops_at_the_first_absent_block"},
    PublishesFailures: {
        "test_lease_with_an_exception_fails_all_keys",
        "test_lease_with_failed_keys_keeps_the_others",
    },
    FailsAll: {"test_lease_with_failed_keys_keeps_the_others"},
    KeepsWhatReadersDistrust: {"test_lease_with_an_exception_fails_all_keys"},
    DoneIsRemoved: {"test_hints_neither_remove_nor_keep_blocks"},
    KeepsForEver: {"test_hints_neither_remove_nor_keep_blocks"},
    EndsOften: {"test_lease_end_twice_raises"},
    LendsWhatIsBeingFilled: {"test_reserve_in_threads_lends_each_block_once"},
    AllOrNothing: {"test_reserve_without_room_lends_the_leading_blocks"},
    NeverForgets: {
        "test_pinned_block_is_not_evicted",
        "test_eviction_starts_at_the_tail_of_a_chain",
    },
    ForgetsPins: {"test_pinned_block_is_not_evicted", "test_stats_count_lent_slots"},
    HeadFirst: {"test_eviction_starts_at_the_tail_of_a_chain"},
    DropFreesTheSlot: {"test_dropped_block_under_a_lease_keeps_its_bytes"},
    ClearLeavesWhatIsFilling: {"test_clear_keeps_the_slots_of_leases"},
    CountsAreLate: {"test_stats_count_lent_slots"},
    RefusesAKeyTwice: {"test_reserve_of_a_key_twice_lends_one_slot"},
    PinsAKeyOnce: {"test_key_twice_is_filled_once_and_read_at_each_position"},
    PinsAnyKeyOnce: {"test_key_twice_is_filled_once_and_read_at_each_position"},
    AccessCountsAKeyOnce: {"test_key_twice_is_filled_once_and_read_at_each_position"},
    BranchesLendAKeyTwice: {"test_key_twice_is_filled_once_and_read_at_each_position"},
    NeedsTheParent: {"test_block_may_be_stored_before_its_parent"},
    RaisesForAnUnknownParent: {"test_block_may_be_stored_before_its_parent"},
    HoldsUpToAHole: {"test_pin_any_lends_all_held_and_filling_blocks"},
    HoldsWhatIsReady: {"test_pin_any_lends_all_held_and_filling_blocks"},
    PinAnyPublishes: {"test_pin_any_lends_all_held_and_filling_blocks"},
    ForgetsPinAny: {
        "test_block_under_pin_any_is_not_evicted",
        "test_clear_keeps_the_slots_under_pin_any",
    },
    PinAnyEndsOften: {"test_lease_end_twice_raises"},
    PinAnyNeverEnds: {
        "test_block_under_pin_any_is_not_evicted",
        "test_clear_keeps_the_slots_under_pin_any",
    },
    PinAnyFreesFillingSlots: {"test_pin_any_that_ends_first_leaves_filling_blocks"},
    FailureFreesWhatIsHeld: {"test_pin_any_of_a_failed_block_frees_its_slot_at_the_end"},
    CountsPrefixesAsLookups: {"test_count_prefix_records_no_lookup"},
    LendsToSidesWithoutAChain: {"test_reserve_branches_lends_all_segments_in_one_lease"},
    RemovesChainsForNewBlocks: {"test_side_blocks_are_evicted_before_their_chain"},
    ClearFreesEverySlot: {"test_clear_keeps_the_slots_under_pin_any"},
}


@pytest.mark.parametrize("wrong", WRONG_FRONTS, ids=lambda wrong: wrong.__name__)
def test_front_tier_tests_on_faulty_tier_fail(wrong: type[WrongDram]) -> None:
    assert failing_tests(FrontTierTests, wrong) >= WRONG_FRONTS[wrong]


def test_front_tier_tests_each_fail_on_some_faulty_tier() -> None:
    only_fronts = suite_test_names(FrontTierTests) - suite_test_names(TierTests)
    assert set().union(*WRONG_FRONTS.values()) == only_fronts
