"""Every policy keeps the contract, and each test of it fails on some policy that is wrong.

A wrong policy is a right one with one thing changed.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from random import Random
from sys import maxsize

import pytest

from kvcache.eviction import POLICIES, Arc, Fifo, Gittins, Lru, Policy, S3Fifo, Take
from kvcache.testing import PolicyTests

NAMES = {name for name in dir(PolicyTests) if name.startswith("test_")}

for name, policy in POLICIES.items():
    globals()[f"Test_{name}"] = type(f"Test_{name}", (PolicyTests,), {"policy": policy})


class GivesTwice(Lru):
    def evict(self, count: int, take: Take) -> None:
        super().evict(count, lambda keys: take(keys) and take(keys))


class ForgetsAnswers(Lru):
    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        if parent is None:
            super().add(keys, parent, now)


class RefusesOldFriends(Lru):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.seen: set[bytes] = set()

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        if self.seen.isdisjoint(keys):
            super().add(keys, parent, now)
        self.seen.update(keys)


class HoldsWhatIsAskedFor(Lru):
    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        super().access(chain, held, now)
        super().add([key for key in chain if key not in self._owner], None, now)


class KeepsNothing(Lru):
    def evict(self, count: int, take: Take) -> None:
        for key in list(self._owner):
            if take([key]) == 0:
                self.remove([key])


class StopsAtWhatIsKept(Lru):
    def evict(self, count: int, take: Take) -> None:
        while count and self._owner:
            tail = self._queue.oldest().keys[-1]
            if not take([tail]):
                return
            self.remove([tail])
            count -= 1


class GoesRoundAndRound(Lru):
    def evict(self, count: int, take: Take) -> None:
        while self._owner:
            super().evict(count, take)


class ForgetsAllAtOnce(Lru):
    def evict(self, count: int, take: Take) -> None:
        super().evict(count, take)
        self.remove(list(self._owner))


class RemovesRuns(Lru):
    def remove(self, keys: Sequence[bytes]) -> None:
        whole = (self._owner[key].keys for key in keys if key in self._owner)
        super().remove(list(dict.fromkeys(chain.from_iterable(list(whole)))))


class AdmitsMore(Lru):
    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return len(keys) + 1


class Remembers(S3Fifo):
    def _remember(self, key: bytes) -> None:
        self._ghost[key] = None


def knows_no_limit(capacity: int) -> Policy:
    policy = Gittins(capacity)  # which cannot be inherited from where it is compiled
    policy._limit = maxsize
    return policy


class KeepsGhosts(Arc):
    def _trim(self) -> None:
        pass


class Draws(Fifo):
    draw = Random(0)

    def evict(self, count: int, take: Take) -> None:
        super().evict(count, lambda keys: take(keys) if self.draw.random() < 0.9 else 0)


class HoldsNothing(Lru):
    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return 0

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        pass


WRONG: dict[Callable[[int], Policy], str] = {
    GivesTwice: "test_what_is_held_leaves_once",
    ForgetsAnswers: "test_a_block_without_a_request_is_held_as_well",
    RefusesOldFriends: "test_what_left_can_come_back",
    HoldsWhatIsAskedFor: "test_what_is_asked_for_in_vain_is_not_held",
    KeepsNothing: "test_what_is_kept_stays",
    StopsAtWhatIsKept: "test_what_is_kept_stays",
    GoesRoundAndRound: "test_when_all_is_kept_there_is_an_end",
    ForgetsAllAtOnce: "test_an_answer_cut_short_forgets_what_was_given",
    RemovesRuns: "test_what_is_removed_does_not_leave_again",
    AdmitsMore: "test_an_answer_about_slots_is_a_number_of_blocks",
    HoldsNothing: "test_an_index_stays_sound",
    Draws: "test_the_same_traffic_has_the_same_answers",
    Remembers: "test_the_state_is_bounded",
    knows_no_limit: "test_the_state_is_bounded",
    KeepsGhosts: "test_the_state_is_bounded",
}


@pytest.mark.parametrize(("wrong", "test"), WRONG.items())
def test_a_wrong_policy_is_found(wrong: Callable[[int], Policy], test: str) -> None:
    suite = type("Suite", (PolicyTests,), {"policy": staticmethod(wrong)})()
    try:
        getattr(suite, test)()
    except Exception:  # noqa: BLE001 - what a wrong policy raises is its own
        return
    pytest.fail(f"{wrong} passes {test}")


def test_each_test_finds_some_policy() -> None:
    assert set(WRONG.values()) == NAMES
