"""L1 keeps the contract of a front tier, under every policy, and what its own constructor says."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from kvcache import Stack
from kvcache.eviction import POLICIES, Eviction, Lru
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE, Slab
from kvcache.testing import FrontTierTests, block_of, keys_of
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


class TestBlocksThatAreNotWholePages(TestDramTier):
    block_nbytes = PAGE + 5
    room_blocks = 66


@pytest.mark.parametrize(("extra", "slots"), [(0, 3), (1, 3), (PAGE - 1, 3), (PAGE, 4)])
def test_capacity_is_never_exceeded(extra: int, slots: int) -> None:
    with closing(DramTier(block_nbytes=PAGE, capacity=Size(3 * PAGE + extra))) as tier:
        assert tier.slab.slots == tier.stats().capacity_blocks == slots
        assert tier.slab.nbytes <= 3 * PAGE + extra


def test_one_slot() -> None:
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
def test_sizes_that_make_no_tier(block_nbytes: int, capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DramTier(block_nbytes=block_nbytes, capacity=Size(capacity))


@pytest.mark.parametrize("nbytes", [0, PAGE - 1, PAGE + 1])
def test_a_block_of_another_size_is_refused_and_nothing_is_kept(nbytes: int) -> None:
    keys = keys_of("size", 2)
    with closing(dram(4)) as tier:
        blocks = [memoryview(bytes(PAGE)), memoryview(bytes(nbytes))]
        with pytest.raises(ValueError, match=f"a block of {nbytes} bytes; this tier keeps {PAGE}"):
            tier.store(keys, blocks)
        assert tier.contains(keys) == [False, False]
        assert tier.stats().pinned_slots == 0


def test_a_buffer_that_is_too_small_costs_no_block() -> None:
    keys = keys_of("small buffer", 1)
    with closing(dram(2)) as tier:
        tier.store(keys, [memoryview(bytes(PAGE))])
        with pytest.raises(ValueError, match=r"\d"):
            tier.load(keys, [memoryview(bytearray(PAGE - 1))])
        assert tier.contains(keys) == [True]
        assert tier.stats().pinned_slots == 0


def test_slots_are_opened_when_their_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(slab: Slab, at: int, nbytes: int) -> int:
        made.append(nbytes)
        return 0 if len(made) == 1 else 12  # ENOMEM

    monkeypatch.setattr(Slab, "allocate", make)
    monkeypatch.setattr("kvcache.slab.PIECE_NBYTES", 2 * PAGE)
    with closing(dram(8)) as tier:
        tier.slab.wait_populated()
        with tier.reserve(keys_of("part", 8)) as lease:
            assert len(lease) == 2
            assert sorted(lease.slots) == [0, 1]
        stats = tier.stats()
        assert (stats.populated_blocks, stats.capacity_blocks) == (2, 8)
        assert stats.declined_blocks == 6


def test_without_any_memory_all_is_declined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Slab, "allocate", lambda slab, at, nbytes: 12)
    with closing(dram(2)) as tier:
        keys = keys_of("none", 1)
        assert tier.store(keys, [memoryview(bytes(PAGE))]) == [False]
        assert tier.access(keys) == len(tier.pin(keys)) == 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


class Choosy(Lru):
    """Finds nothing worth a slot of a full tier."""

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return 0


def test_what_feeds_others_declines_nothing_there_is_room_for() -> None:
    with closing(dram(3, eviction=f"{__name__}:Choosy")) as tier:
        tier.slab.wait_populated()
        a, b, c = (keys_of(name, 3) for name in "abc")
        tier.reserve(a).end()
        assert len(tier.reserve(b)) == 0
        assert tier.stats().declined_blocks == 3
        tier.disable_admission()
        with tier.reserve(b) as lease:
            assert len(lease) == 3
            assert len(tier.reserve(c)) == 0


@pytest.mark.parametrize("below", [0, 1])
def test_a_stack_says_so_when_it_has_tiers_below(below: int) -> None:
    front = dram(3, eviction=f"{__name__}:Choosy")
    lower = [LowerTier(dram(3), name="l2", front=front, namespace=b"s") for _ in range(below)]
    with Stack(front, lower, profile="test") as stack:
        front.slab.wait_populated()
        stack.reserve(keys_of("a", 3)).end()
        lease = stack.reserve(keys_of("b", 3))
        lease.end()
        assert len(lease) == 3 * below


def test_a_policy_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="eviction is 'lfu': no policy is called"):
        dram(3, eviction="lfu")
