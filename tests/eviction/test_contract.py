"""Every policy passes the contract, and each test of the contract fails for some wrong policy.

A wrong policy is a shipped one with one method changed.
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


class OffersTwice(Lru):
    def evict(self, count: int, take: Take) -> None:
        super().evict(count, lambda keys: take(keys) and take(keys))


class IgnoresContinuations(Lru):
    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        if parent is None:
            super().add(keys, parent, now)


class RefusesReturningBlocks(Lru):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.seen: set[bytes] = set()

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        if self.seen.isdisjoint(keys):
            super().add(keys, parent, now)
        self.seen.update(keys)


class HoldsMissingBlocks(Lru):
    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        super().access(chain, held, now)
        super().add([key for key in chain if key not in self.run_of], None, now)


class ForgetsPinnedBlocks(Lru):
    def evict(self, count: int, take: Take) -> None:
        for key in list(self.run_of):
            if take([key]) == 0:
                self.remove([key])


class StopsAtPinnedTail(Lru):
    def evict(self, count: int, take: Take) -> None:
        while count and self.run_of:
            tail = self._queue.oldest().keys[-1]
            if not take([tail]):
                return
            self.remove([tail])
            count -= 1


class EvictsWithoutEnd(Lru):
    def evict(self, count: int, take: Take) -> None:
        while self.run_of:
            super().evict(count, take)


class ForgetsAllOnEvict(Lru):
    def evict(self, count: int, take: Take) -> None:
        super().evict(count, take)
        self.remove(list(self.run_of))


class RemovesWholeRuns(Lru):
    def remove(self, keys: Sequence[bytes]) -> None:
        whole = (self.run_of[key].keys for key in keys if key in self.run_of)
        super().remove(list(dict.fromkeys(chain.from_iterable(list(whole)))))


class AdmitsTooMany(Lru):
    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return len(keys) + 1


class KeepsAllS3FifoGhosts(S3Fifo):
    def _add_ghost(self, key: bytes) -> None:
        self.ghosts[key] = None


def gittins_without_limit(capacity: int) -> Policy:
    return Gittins(capacity, known_limit=maxsize)


class KeepsAllArcGhosts(Arc):
    def _trim_ghosts(self) -> None:
        pass


class EvictsAtRandom(Fifo):
    draw = Random(0)

    def evict(self, count: int, take: Take) -> None:
        super().evict(count, lambda keys: take(keys) if self.draw.random() < 0.9 else 0)


class RefusesBlocksBeforeTheirParent(Lru):
    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        if parent is None or parent in self.run_of:
            super().add(keys, parent, now)


class StopsAtBlockedBlock(Lru):
    def evict(self, count: int, take: Take) -> None:
        for key in list(self.run_of)[:count]:
            if not take([key]):
                return
            self.remove([key])


class KeepsAllParents(Lru):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.parents: set[bytes] = set()

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        super().add(keys, parent, now)
        if parent is not None:
            self.parents.add(bytes(bytearray(parent)))


class HoldsNothing(Lru):
    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return 0

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        pass


WRONG: dict[Callable[[int], Policy], str] = {
    OffersTwice: "test_evict_offers_each_held_block_once",
    IgnoresContinuations: "test_add_without_access_holds_the_blocks",
    RefusesReturningBlocks: "test_add_after_eviction_holds_the_blocks_again",
    HoldsMissingBlocks: "test_access_of_missing_blocks_holds_nothing",
    ForgetsPinnedBlocks: "test_evict_with_a_pinned_tail_keeps_that_block",
    StopsAtPinnedTail: "test_evict_with_a_pinned_tail_keeps_that_block",
    EvictsWithoutEnd: "test_evict_with_all_blocks_pinned_returns",
    ForgetsAllOnEvict: "test_evict_of_some_blocks_forgets_only_those",
    RemovesWholeRuns: "test_removed_blocks_are_not_offered",
    AdmitsTooMany: "test_admit_returns_at_most_the_number_of_keys",
    RefusesBlocksBeforeTheirParent: "test_side_blocks_reported_before_their_chain_are_held",
    StopsAtBlockedBlock: "test_index_stays_consistent_with_side_blocks",
    KeepsAllParents: "test_state_is_bounded_with_side_blocks",
    HoldsNothing: "test_index_stays_consistent_under_mixed_traffic",
    EvictsAtRandom: "test_same_calls_evict_the_same_blocks",
    KeepsAllS3FifoGhosts: "test_state_is_bounded",
    gittins_without_limit: "test_state_is_bounded",
    KeepsAllArcGhosts: "test_state_is_bounded",
}


@pytest.mark.parametrize(("wrong", "test"), WRONG.items())
def test_policy_tests_wrong_policy_fails_its_test(
    wrong: Callable[[int], Policy], test: str
) -> None:
    suite = type("Suite", (PolicyTests,), {"policy": staticmethod(wrong)})()
    try:
        getattr(suite, test)()
    except Exception:  # noqa: BLE001 - a wrong policy may raise anything
        return
    pytest.fail(f"{wrong} passes {test}")


def test_policy_tests_each_test_fails_for_some_wrong_policy() -> None:
    assert set(WRONG.values()) == NAMES
