"""Each test of the front tier's contract fails on some front tier that is wrong.

A wrong tier is L1 with one thing changed; test_dram.py shows that L1 itself passes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import pytest

from kvcache.sizes import Size
from kvcache.testing import FrontTierTests, TierTests
from kvcache.tier import Lease, TierStats
from kvcache.tiers.dram import DramTier
from tests.support.contract_runs import failures, names_of_tests

NBYTES = FrontTierTests.block_nbytes
ROOM = FrontTierTests.room_blocks


class WrongDram(DramTier):
    """Wrong in nothing yet."""

    def __init__(self) -> None:
        super().__init__(block_nbytes=NBYTES, capacity=Size(ROOM * NBYTES))


class AccessIgnoresStart(WrongDram):
    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        return super().access(chain, 0)


class HeldWhileFilling(WrongDram):
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self._index.ready() or key in self._index.filling() for key in keys]


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
        with self._lock:
            self._index.unpin(lease.slots)
        return Lease(lease.keys, lease.slots, lease.positions, self._view, self._forget_pins)

    def _forget_pins(self, lease: Lease, failed: frozenset[bytes]) -> None:
        self.remove(list(failed))


class HeadFirst(WrongDram):
    """Gives up a whole chain where its tail would do, and the chain that goes on, too."""

    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        held = list(self._index.ready())
        if len(held) == ROOM:
            self.remove(held[: len(keys)])
        return super().reserve(keys, parent)


class DropFreesTheSlot(WrongDram):
    """A dropped block's slot is given out while it is read."""

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in keys:
                if (slot := self._index.ready().get(key)) is not None:
                    self._index._pins.pop(slot, None)
        super().remove(keys)


class ClearLeavesWhatIsFilling(WrongDram):
    def clear(self) -> None:
        with self._lock:
            self._index.drop(list(self._index.ready()))


class CountsAreLate(WrongDram):
    def stats(self) -> TierStats:
        stats = super().stats()
        return dataclasses.replace(stats, stored_blocks=max(0, stats.stored_blocks - 1))


class RefusesAKeyTwice(WrongDram):
    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        if len(set(keys)) < len(keys):
            raise KeyError(keys[0])
        return super().reserve(keys, parent)


class HoldsUpToAHole(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return self.pin(keys)


class HoldsWhatIsReady(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return super().pin_any([key for key in keys if self.contains([key])[0]])


class HoldPublishes(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        with self._lock:
            self._index.publish([s for s in lease.slots if self._is_filling(s)])
        return lease

    def _is_filling(self, slot: int) -> bool:
        return slot in self._index.filling().values()


class ForgetsHolds(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        with self._lock:
            self._index.unpin(lease.slots)
        return Lease(lease.keys, lease.slots, lease.positions, self._view, lambda lease, bad: None)


class HoldEndsOften(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        return LeaseThatEndsOften(
            lease.keys, lease.slots, lease.positions, self._view, self._release
        )


class HoldNeverEnds(WrongDram):
    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        lease = super().pin_any(keys)
        return Lease(lease.keys, lease.slots, lease.positions, self._view, lambda lease, bad: None)


class HoldGivesUpWhatIsFilled(HoldPublishes):
    """The end of a hold takes the slot from who fills it."""

    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        return WrongDram.pin_any(self, keys)

    def _release(self, lease: Lease, failed: frozenset[bytes]) -> None:
        filling = [slot for slot in lease.slots if self._is_filling(slot)]
        with self._lock:
            self._index.publish(filling, lease.keys)
        super()._release(lease, failed)


class FailureFreesWhatIsHeld(WrongDram):
    def _publish(self, lease: Lease, failed: frozenset[bytes]) -> None:
        with self._lock:
            for key, slot in zip(lease.keys, lease.slots, strict=True):
                if key in failed:
                    self._index._pins.pop(slot, None)
        super()._publish(lease, failed)


class ClearFreesEverySlot(WrongDram):
    def clear(self) -> None:
        with self._lock:
            self._index._pins.clear()
        super().clear()


WRONG_FRONTS: dict[type[WrongDram], set[str]] = {
    AccessIgnoresStart: {"test_access_says_how_much_of_a_prefix_is_held"},
    HeldWhileFilling: {"test_a_block_is_held_once_its_lease_ends_well"},
    LendsWhatItHolds: {"test_only_what_is_missing_is_lent"},
    PositionsAreCounted: {"test_only_what_is_missing_is_lent"},
    PinsPastAHole: {"test_pin_lends_up_to_the_first_hole"},
    PublishesFailures: {"test_an_exception_is_a_failure", "test_what_failed_is_given_up_alone"},
    FailsAll: {"test_what_failed_is_given_up_alone"},
    KeepsWhatReadersDistrust: {"test_an_exception_is_a_failure"},
    DoneIsRemoved: {"test_hints_take_nothing_away_and_promise_nothing"},
    KeepsForEver: {"test_hints_take_nothing_away_and_promise_nothing"},
    EndsOften: {"test_a_lease_ends_exactly_once"},
    LendsWhatIsBeingFilled: {"test_of_several_threads_one_fills_a_block"},
    AllOrNothing: {"test_a_lease_is_shorter_when_there_is_no_room"},
    NeverForgets: {"test_what_is_pinned_stays", "test_a_chain_loses_its_tail_first"},
    ForgetsPins: {"test_what_is_pinned_stays", "test_stats_say_what_is_lent"},
    HeadFirst: {"test_a_chain_loses_its_tail_first"},
    DropFreesTheSlot: {"test_a_dropped_block_is_read_to_the_end"},
    ClearLeavesWhatIsFilling: {"test_clear_takes_nothing_from_a_lease"},
    CountsAreLate: {"test_stats_say_what_is_lent"},
    RefusesAKeyTwice: {"test_a_key_twice_in_a_reserve"},
    HoldsUpToAHole: {"test_hold_lends_what_there_is_wherever_it_is"},
    HoldsWhatIsReady: {"test_hold_lends_what_there_is_wherever_it_is"},
    HoldPublishes: {"test_hold_lends_what_there_is_wherever_it_is"},
    ForgetsHolds: {"test_what_is_held_on_to_stays", "test_clear_takes_nothing_from_a_hold"},
    HoldEndsOften: {"test_a_lease_ends_exactly_once"},
    HoldNeverEnds: {"test_what_is_held_on_to_stays", "test_clear_takes_nothing_from_a_hold"},
    HoldGivesUpWhatIsFilled: {"test_a_hold_that_ends_first_leaves_a_block_to_who_fills_it"},
    FailureFreesWhatIsHeld: {"test_a_hold_of_what_could_not_be_filled"},
    ClearFreesEverySlot: {"test_clear_takes_nothing_from_a_hold"},
}


@pytest.mark.parametrize("wrong", WRONG_FRONTS, ids=lambda wrong: wrong.__name__)
def test_a_wrong_front_tier_fails(wrong: type[WrongDram]) -> None:
    assert failures(FrontTierTests, wrong) >= WRONG_FRONTS[wrong]


def test_every_test_can_fail() -> None:
    only_fronts = names_of_tests(FrontTierTests) - names_of_tests(TierTests)
    assert set().union(*WRONG_FRONTS.values()) == only_fronts
