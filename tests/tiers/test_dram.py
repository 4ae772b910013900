"""DramTier: the contract of front tiers under every policy, and its constructor."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from kvcache import Stack
from kvcache.eviction import POLICIES, Eviction, Lru
from kvcache.keys import Branch
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE, Slab
from kvcache.testing import FrontTierTests, block_of, keys_of
from kvcache.tier import FrontTier, Lease
from kvcache.tiers.dram import DramTier


def dram(slots: int, block_nbytes: int = PAGE, eviction: str = "lru") -> DramTier:
    slot_nbytes = -(-block_nbytes // PAGE) * PAGE
    return DramTier(
        block_nbytes=block_nbytes,
        capacity=Size(slots * slot_nbytes),
        eviction=Eviction(eviction),
        clock=map(float, itertools.count()).__next__,
    )


class TestDramTier(FrontTierTests):
    @pytest.fixture(params=POLICIES)
    def tier(self, request: pytest.FixtureRequest) -> Iterator[DramTier]:
        with closing(dram(self.room_blocks, self.block_nbytes, request.param)) as tier:
            yield tier


class DefaultBranches(DramTier):
    """A front tier with the methods that a third-party class inherits."""

    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int:
        return FrontTier.count_prefix(self, chain, start)

    def reserve_branches(self, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> Lease:
        return FrontTier.reserve_branches(self, chains, sides)


class TestDefaultBranches(FrontTierTests):
    @pytest.fixture
    def tier(self) -> Iterator[DramTier]:
        capacity = Size(self.room_blocks * PAGE)
        with closing(DefaultBranches(block_nbytes=PAGE, capacity=capacity)) as tier:
            yield tier


class TestDramTierWithPartialPages(TestDramTier):
    block_nbytes = PAGE + 5
    room_blocks = 66


@pytest.mark.parametrize(("extra", "slots"), [(0, 3), (1, 3), (PAGE - 1, 3), (PAGE, 4)])
def test_dram_never_exceeds_capacity(extra: int, slots: int) -> None:
    with closing(DramTier(block_nbytes=PAGE, capacity=Size(3 * PAGE + extra))) as tier:
        assert tier.slab.slots == tier.stats().capacity_blocks == slots
        assert tier.slab.nbytes <= 3 * PAGE + extra


def test_dram_with_one_slot_evicts_for_each_block() -> None:
    with closing(dram(1)) as tier:
        for key in keys_of("one", 3):
            assert tier.store([key], [memoryview(block_of(key, PAGE))]) == [True]
            assert tier.contains([key]) == [True]
        stats = tier.stats()
        assert (stats.used_blocks, stats.evicted_blocks, stats.pinned_slots) == (1, 2, 0)


@pytest.mark.parametrize(
    ("block_nbytes", "capacity", "message"),
    [
        (0, PAGE, "block_nbytes is 0; a block has at least one byte"),
        (-1, PAGE, "block_nbytes is -1; a block has at least one byte"),
        (PAGE + 1, PAGE, f"capacity is {PAGE} bytes; one block takes {2 * PAGE}"),
    ],
)
def test_dram_with_invalid_sizes_raises_value_error(
    block_nbytes: int, capacity: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DramTier(block_nbytes=block_nbytes, capacity=Size(capacity))


@pytest.mark.parametrize("nbytes", [0, PAGE - 1, PAGE + 1])
def test_dram_store_of_wrong_size_raises_and_keeps_nothing(nbytes: int) -> None:
    keys = keys_of("size", 2)
    with closing(dram(4)) as tier:
        blocks = [memoryview(bytes(PAGE)), memoryview(bytes(nbytes))]
        with pytest.raises(ValueError, match=f"a block of {nbytes} bytes; this tier keeps {PAGE}"):
            tier.store(keys, blocks)
        assert tier.contains(keys) == [False, False]
        assert tier.stats().pinned_slots == 0


def test_dram_load_into_too_small_buffer_raises_and_keeps_the_block() -> None:
    keys = keys_of("small buffer", 1)
    with closing(dram(2)) as tier:
        tier.store(keys, [memoryview(bytes(PAGE))])
        with pytest.raises(ValueError, match=r"\d"):
            tier.load(keys, [memoryview(bytearray(PAGE - 1))])
        assert tier.contains(keys) == [True]
        assert tier.stats().pinned_slots == 0


def test_dram_opens_only_slots_with_populated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []

    def allocate(slab: Slab, at: int, nbytes: int) -> int:
        allocated.append(nbytes)
        return 0 if len(allocated) == 1 else 12  # ENOMEM

    monkeypatch.setattr(Slab, "allocate", allocate)
    monkeypatch.setattr("kvcache.slab.EXTENT_NBYTES", 2 * PAGE)
    with closing(dram(8)) as tier:
        tier.slab.wait_populated()
        with tier.reserve(keys_of("part", 8)) as lease:
            assert len(lease) == 2
            assert sorted(lease.slots) == [0, 1]
        stats = tier.stats()
        assert (stats.populated_blocks, stats.capacity_blocks) == (2, 8)
        assert stats.declined_blocks == 6


def test_dram_without_memory_declines_every_block(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Slab, "allocate", lambda slab, at, nbytes: 12)
    with closing(dram(2)) as tier:
        keys = keys_of("none", 1)
        assert tier.store(keys, [memoryview(bytes(PAGE))]) == [False]
        assert tier.access(keys) == len(tier.pin(keys)) == 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


class AdmitNothingLru(Lru):
    """Admits no block to a full tier."""

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return 0


def test_dram_with_admission_disabled_accepts_what_fits() -> None:
    with closing(dram(3, eviction=f"{__name__}:AdmitNothingLru")) as tier:
        tier.slab.wait_populated()
        a, b, c = (keys_of(name, 3) for name in "abc")
        tier.reserve(a).end()
        assert len(tier.reserve(b)) == 0
        assert tier.stats().declined_blocks == 3
        tier.disable_admission()
        with tier.reserve(b) as lease:
            assert len(lease) == 3
            assert len(tier.reserve(c)) == 0


@pytest.mark.parametrize("lower_tiers", [0, 1])
def test_stack_with_lower_tiers_disables_admission_of_the_front_tier(lower_tiers: int) -> None:
    front = dram(3, eviction=f"{__name__}:AdmitNothingLru")
    lower = [LowerTier(dram(3), name="l2", front=front, namespace=b"s") for _ in range(lower_tiers)]
    with Stack(front, lower, profile="test") as stack:
        front.slab.wait_populated()
        stack.reserve(keys_of("a", 3)).end()
        lease = stack.reserve(keys_of("b", 3))
        lease.end()
        assert len(lease) == 3 * lower_tiers


def test_dram_with_unknown_policy_raises_value_error() -> None:
    with pytest.raises(ValueError, match="eviction is 'lfu': no policy is called"):
        dram(3, eviction="lfu")
