"""The contract suite passes on a correct tier, and each of its tests fails on some wrong tier.

A wrong tier is the correct one with one change.
"""

import logging
import time
from collections.abc import Sequence

import pytest

from kvcache.keys import MAX_KEY_NBYTES, Branch
from kvcache.testing import TierTests
from kvcache.tier import Tier, TierUsage
from tests.support.contract_runs import failing_tests, suite_test_names

NBYTES = TierTests.block_nbytes
ROOM = TierTests.room_blocks


class DictTier(Tier):
    """The simplest correct tier."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.closed = False

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.held for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        return [self.load_one(key, buffer) for key, buffer in zip(keys, into, strict=True)]

    def load_one(self, key: bytes, buffer: memoryview) -> int:
        block = self.held.get(key, b"")
        buffer[: len(block)] = block
        return len(block)

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [self.store_one(key, block) for key, block in zip(keys, blocks, strict=True)]

    def store_one(self, key: bytes, block: memoryview) -> bool:
        self.held.setdefault(key, bytes(block))
        return True

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        self.closed = True


class TestDictTier(TierTests):
    @pytest.fixture
    def tier(self) -> DictTier:
        return DictTier()


class ForgetsTheOrder(DictTier):
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return sorted(super().contains(keys))


class HoldsEverything(DictTier):
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys)


class StopsAtAMiss(DictTier):
    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = super().load(keys, into)
        return written[: written.index(0)] if 0 in written else written


class WipesOnAMiss(DictTier):
    def load_one(self, key: bytes, buffer: memoryview) -> int:
        if key not in self.held:
            buffer[:] = bytes(len(buffer))
        return super().load_one(key, buffer)


class WritesPastABlock(DictTier):
    def load_one(self, key: bytes, buffer: memoryview) -> int:
        if key in self.held:
            buffer[:] = bytes(len(buffer))
        return super().load_one(key, buffer)


class LosesTheLastByte(DictTier):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        self.held.setdefault(key, bytes(block[:-1]) + b"\0")
        return True


class ReadsOnce(DictTier):
    def load_one(self, key: bytes, buffer: memoryview) -> int:
        written = super().load_one(key, buffer)
        self.held.pop(key, None)
        return written


class Overwrites(DictTier):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        self.held[key] = bytes(block)
        return True


class DeclinesWhatItHolds(DictTier):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        return key not in self.held and super().store_one(key, block)


class NeedsTheParent(DictTier):
    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        if parent is not None and parent not in self.held:
            return [False] * len(keys)
        return super().store(keys, blocks)


class LosesTheRest(DictTier):
    """Removes the children of a removed block too."""

    def __init__(self) -> None:
        super().__init__()
        self.parents: dict[bytes, bytes | None] = {}

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.parents.update(dict.fromkeys(keys, parent))
        return super().store(keys, blocks)

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys)
        for key, parent in self.parents.items():
            if parent in keys:
                self.held.pop(key, None)


class NeedsAKey(DictTier):
    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove([keys[0], *keys])


class MissesAreErrors(DictTier):
    def remove(self, keys: Sequence[bytes]) -> None:
        for key in set(keys):
            del self.held[key]


class RemovesAll(DictTier):
    def remove(self, keys: Sequence[bytes]) -> None:
        self.held.clear()


class RemovesNothing(DictTier):
    def remove(self, keys: Sequence[bytes]) -> None:
        pass


class CutsKeys(DictTier):
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return super().contains([key[:16] for key in keys])

    def load_one(self, key: bytes, buffer: memoryview) -> int:
        return super().load_one(key[:16], buffer)

    def store_one(self, key: bytes, block: memoryview) -> bool:
        return super().store_one(key[:16], block)

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove([key[:16] for key in keys])


class CutsLongKeys(DictTier):
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return super().contains([key[:MAX_KEY_NBYTES] for key in keys])

    def store_one(self, key: bytes, block: memoryview) -> bool:
        return super().store_one(key[:MAX_KEY_NBYTES], block)


class RefusesLongKeys(DictTier):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        if len(key) > MAX_KEY_NBYTES - 1:
            raise ValueError("a key is too long")
        return super().store_one(key, block)


class KeysAreText(DictTier):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        if b"\n" in key and b"/" in key:
            raise ValueError("not a file name")
        return super().store_one(key, block)


class IsSmall(DictTier):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        return len(self.held) < ROOM - 1 and super().store_one(key, block)


class KeepsTheBuffer(DictTier):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        self.held.setdefault(key, block)  # type: ignore[arg-type]
        return True


class ClosesOnce(DictTier):
    def close(self) -> None:
        if self.held and self.closed:
            raise RuntimeError("closed already")
        super().close()


class SharesABuffer(DictTier):
    def __init__(self) -> None:
        super().__init__()
        self.scratch = bytearray(NBYTES)

    def load_one(self, key: bytes, buffer: memoryview) -> int:
        if key not in self.held:
            return 0
        self.scratch[:] = self.held[key]
        time.sleep(0.001)  # another thread overwrites the buffer meanwhile
        buffer[:NBYTES] = self.scratch
        return NBYTES


class ForgetsEveryNamespace(DictTier):
    def forget(self, namespace: bytes) -> None:
        self.held.clear()


class StoresOneSegment(DictTier):
    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        super().store_branches(branches[:1], blocks)
        return [True] * len(blocks)


class LoadsEachKeyOnce(DictTier):
    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = super().load(list(dict(zip(keys, into, strict=True))), into[: len(set(keys))])
        return written + [0] * (len(keys) - len(written))


class RemovesEachKeyTwice(DictTier):
    def remove(self, keys: Sequence[bytes]) -> None:
        held = [key for key in keys if key in self.held]
        for key in held:
            del self.held[key]


class KeepsTheLastOfBranches(DictTier):
    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        keys = [key for branch, _ in branches for key in branch]
        last = dict(zip(keys, blocks, strict=True))
        return [self.store_one(key, last[key]) for key in keys]


class DeclinesLongKeys(DictTier):
    """Correct: it declines, counts and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.declined = 0

    def store_one(self, key: bytes, block: memoryview) -> bool:
        if len(key) <= MAX_KEY_NBYTES:
            return super().store_one(key, block)
        self.declined += 1
        if self.declined == 1:
            self.log_decline()
        return False

    def log_decline(self) -> None:
        logging.getLogger("tier").warning("a key is too long")

    def usage(self) -> TierUsage:
        return TierUsage(declined_blocks={"key too long": self.declined})


class TestTierThatDeclines(TierTests):
    @pytest.fixture
    def tier(self) -> DictTier:
        return DeclinesLongKeys()


class DeclinesUncounted(DeclinesLongKeys):
    def usage(self) -> TierUsage:
        return TierUsage()


class CountsCallsThatDecline(DeclinesLongKeys):
    def usage(self) -> TierUsage:
        return TierUsage(declined_blocks={"key too long": self.declined // 2})


class DeclinesSilently(DeclinesLongKeys):
    def log_decline(self) -> None:
        pass


class LogsEveryDecline(DeclinesLongKeys):
    def store_one(self, key: bytes, block: memoryview) -> bool:
        stored = super().store_one(key, block)
        if not stored:
            self.log_decline()
        return stored


WRONG_TIERS: dict[type[DictTier], set[str]] = {
    ForgetsTheOrder: {"test_results_are_per_key_and_in_order"},
    HoldsEverything: {"test_load_after_store_returns_the_bytes"},
    StopsAtAMiss: {"test_results_are_per_key_and_in_order"},
    WipesOnAMiss: {"test_load_after_store_returns_the_bytes"},
    WritesPastABlock: {"test_load_after_store_returns_the_bytes"},
    LosesTheLastByte: {"test_load_after_store_returns_the_bytes"},
    ReadsOnce: {"test_load_after_store_returns_the_bytes"},
    Overwrites: {
        "test_store_of_a_held_key_changes_nothing",
        "test_key_twice_in_a_batch_is_one_block",
    },
    DeclinesWhatItHolds: {
        "test_store_of_a_held_key_changes_nothing",
        "test_key_twice_in_a_batch_is_one_block",
    },
    LoadsEachKeyOnce: {"test_key_twice_in_a_batch_is_one_block"},
    RemovesEachKeyTwice: {"test_key_twice_in_a_batch_is_one_block"},
    KeepsTheLastOfBranches: {"test_key_twice_in_branches_is_one_block"},
    DeclinesUncounted: {"test_declined_block_is_counted_and_its_reason_logged_once"},
    CountsCallsThatDecline: {"test_declined_block_is_counted_and_its_reason_logged_once"},
    DeclinesSilently: {"test_declined_block_is_counted_and_its_reason_logged_once"},
    LogsEveryDecline: {"test_declined_block_is_counted_and_its_reason_logged_once"},
    NeedsAKey: {"test_empty_batch_does_nothing"},
    NeedsTheParent: {"test_parent_changes_no_result"},
    StoresOneSegment: {"test_store_branches_stores_each_segment"},
    LosesTheRest: {"test_parent_changes_no_result"},
    MissesAreErrors: {"test_remove_removes_only_its_keys"},
    RemovesAll: {"test_remove_removes_only_its_keys"},
    RemovesNothing: {"test_remove_removes_only_its_keys"},
    CutsKeys: {"test_keys_of_any_length_and_bytes_are_distinct"},
    CutsLongKeys: {"test_key_longer_than_the_contract_is_kept_or_declined"},
    RefusesLongKeys: {
        "test_keys_of_any_length_and_bytes_are_distinct",
        "test_key_longer_than_the_contract_is_kept_or_declined",
    },
    KeysAreText: {"test_keys_of_any_length_and_bytes_are_distinct"},
    IsSmall: {"test_room_blocks_fit"},
    KeepsTheBuffer: {"test_store_and_load_copy_the_bytes"},
    ClosesOnce: {"test_close_twice_is_allowed"},
    SharesABuffer: {"test_threads_do_not_mix_up_blocks"},
    ForgetsEveryNamespace: {"test_resolve_and_forget_keep_other_namespaces"},
}


@pytest.mark.parametrize("wrong", WRONG_TIERS, ids=lambda wrong: wrong.__name__)
def test_suite_on_a_wrong_tier_fails(wrong: type[DictTier]) -> None:
    assert failing_tests(TierTests, wrong) >= WRONG_TIERS[wrong]


def test_suite_has_a_wrong_tier_for_each_test() -> None:
    assert set().union(*WRONG_TIERS.values()) == suite_test_names(TierTests)
