"""Segments of an index: merged, cut, published in parts, and protected from a policy."""

import gc
import itertools
import sys
from collections.abc import Sequence

import pytest

from kvcache.eviction import Fifo, Gittins, Lru, Policy, Take
from kvcache.index import Index
from kvcache.replay.generators import generate
from kvcache.replay.simulate import SimulatedTiers
from kvcache.segments import SegmentTable
from tests.support.traces import play


def chain_of(blocks: int) -> list[bytes]:
    return [b"%d" % at for at in range(blocks)]


def index_of(slots: int) -> Index:
    index = Index(Lru(slots), map(float, itertools.count()).__next__)
    index.open_slots(slots)
    return index


def test_chain_longer_than_a_segment_is_found_whole() -> None:
    index, chain = index_of(1000), chain_of(900)
    _, slots = index.reserve(chain, None)
    index.check()
    index.publish(slots)
    index.check()
    assert index.access(chain, 0) == 900
    assert index.pin(chain[700:]) == slots[700:]
    index.unpin(slots[700:])
    index.publish(index.reserve([b"x%d" % at for at in range(600)], None)[1])
    index.check()
    assert index.access(chain, 0) == 400


class AddRecorder(Lru):
    adds: list[tuple[int, bytes | None]]

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self.adds.append((len(keys), parent))
        super().add(keys, parent, now)


def test_publish_of_several_segments_reports_one_chain_to_the_policy() -> None:
    policy, chain = AddRecorder(1000), chain_of(900)
    policy.adds = []
    index = Index(policy, lambda: 0.0)
    index.open_slots(1000)
    index.publish(index.reserve(chain[:2], None)[1] + index.reserve(chain[3:], chain[2])[1])
    assert policy.adds == [(2, None), (897, chain[2])]


def test_reserve_evicts_no_block_of_its_own_request() -> None:
    index = index_of(3)
    index.publish(index.reserve(chain_of(3), None)[1])
    index.drop([b"1"])
    index.publish(index.reserve([b"x"], None)[1])
    index.publish(index.reserve(chain_of(3), None)[1])
    index.check()
    assert [key in index for key in (b"0", b"1", b"2", b"x")] == [True, True, True, False]


def test_publish_in_parts_makes_each_part_ready() -> None:
    index, chain = index_of(9), chain_of(9)
    _, slots = index.reserve(chain, None)
    index.publish(slots[3:5])
    index.check()
    assert [key in index for key in chain] == [at in (3, 4) for at in range(9)]
    index.publish(slots[5:])
    index.publish(slots[:3])
    index.check()
    assert index.access(chain, 0) == 9


def test_blocks_published_one_by_one_are_merged_into_few_segments() -> None:
    index, chain = index_of(1000), chain_of(1000)
    for at, key in enumerate(chain):
        index.publish(index.reserve([key], chain[at - 1] if at else None)[1])
    index.check()
    assert len(index.segments.by_first_slot) == 4
    assert index.access(chain, 0) == 1000
    index.publish(index.reserve([b"x", b"y"], None)[1])
    index.check()
    assert index.access(chain, 0) == 998


def test_drop_in_the_middle_removes_one_block() -> None:
    index, chain = index_of(9), chain_of(9)
    index.publish(index.reserve(chain, None)[1])
    index.drop(chain[4:5])
    index.check()
    assert index.access(chain, 0) == 4
    index.publish(index.reserve(chain[4:5], chain[3])[1])
    index.check()
    assert index.access(chain, 0) == 9


class OffersFillingBlock(Fifo):
    """Offers a block that is being filled."""

    taken = -1

    def evict(self, count: int, take: Take) -> None:
        self.taken = take([b"a"])
        super().evict(count, take)


def test_take_of_a_filling_block_evicts_nothing() -> None:
    policy = OffersFillingBlock(2)
    index = Index(policy, map(float, itertools.count()).__next__)
    index.open_slots(2)
    _, slots = index.reserve([b"a"], None)
    assert index.reserve([b"x", b"y"], None)[0] == [0]
    assert policy.taken == 0
    index.publish(slots)
    index.check()
    assert b"a" in index


def test_remove_of_the_last_child_ends_its_count() -> None:
    table = SegmentTable()
    for name in (b"x", b"y"):
        table.add((name,), (int(name == b"y"),), b"parent")
    assert table.child_counts == {b"parent": 2}
    assert table.remove(b"x") == 0
    assert table.child_counts == {b"parent": 1}
    assert table.remove(b"y") == 1
    assert table.child_counts == {}
    table.check()


@pytest.mark.parametrize("policy", [Lru, Gittins])
def test_evicted_blocks_are_freed_without_a_garbage_collection(policy: type[Policy]) -> None:
    trace, tiers = generate("chat", 1000), SimulatedTiers(policy, [200], step_blocks=16)
    gc.collect()
    gc.disable()
    try:
        play(tiers, trace)
        assert tiers.front.evicted_blocks > 10 * 200
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="every dictionary is looked at there")
def test_garbage_collector_tracks_no_entry_per_block() -> None:
    policy = Gittins(200)
    tiers = SimulatedTiers(lambda _: policy, [200], step_blocks=16)
    play(tiers, generate("chat", 1000))
    gc.collect()
    assert not gc.is_tracked(tiers.front.segments.first_slots)
    assert not gc.is_tracked(policy.run_ids)
    segments, runs = tiers.front.segments.by_first_slot.values(), policy.runs.values()
    assert not any(gc.is_tracked(each.keys) or gc.is_tracked(each.slots) for each in segments)
    assert not any(gc.is_tracked(run.keys) for run in runs)
