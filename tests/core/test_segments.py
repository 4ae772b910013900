"""Stretches of an index: long ones, ones that are cut, and what a policy may not take of them."""

import gc
import itertools
import sys
from collections.abc import Sequence

import pytest

from kvcache.eviction import Fifo, Gittins, Lru, Policy, Take
from kvcache.index import Index
from kvcache.segments import SegmentTable
from tests.support.eviction_traffic import GENERATORS, Replay


def chain_of(blocks: int) -> list[bytes]:
    return [b"%d" % at for at in range(blocks)]


def index_of(slots: int) -> Index:
    index = Index(Lru(slots), map(float, itertools.count()).__next__)
    index.open_slots(slots)
    return index


def test_a_long_chain_is_one_of_many_stretches() -> None:
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


class Told(Lru):
    adds: list[tuple[int, bytes | None]]

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self.adds.append((len(keys), parent))
        super().add(keys, parent, now)


def test_of_many_stretches_a_policy_is_told_as_of_one_chain() -> None:
    policy, chain = Told(1000), chain_of(900)
    policy.adds = []
    index = Index(policy, lambda: 0.0)
    index.open_slots(1000)
    index.publish(index.reserve(chain[:2], None)[1] + index.reserve(chain[3:], chain[2])[1])
    assert policy.adds == [(2, None), (897, chain[2])]


def test_what_is_asked_for_as_well_stays() -> None:
    index = index_of(3)
    index.publish(index.reserve(chain_of(3), None)[1])
    index.drop([b"1"])
    index.publish(index.reserve([b"x"], None)[1])
    index.publish(index.reserve(chain_of(3), None)[1])
    index.check()
    assert [key in index for key in (b"0", b"1", b"2", b"x")] == [True, True, True, False]


def test_what_is_published_in_parts_is_held_in_parts() -> None:
    index, chain = index_of(9), chain_of(9)
    _, slots = index.reserve(chain, None)
    index.publish(slots[3:5])
    index.check()
    assert [key in index for key in chain] == [at in (3, 4) for at in range(9)]
    index.publish(slots[5:])
    index.publish(slots[:3])
    index.check()
    assert index.access(chain, 0) == 9


def test_what_comes_a_block_at_a_time_is_no_more_stretches() -> None:
    index, chain = index_of(1000), chain_of(1000)
    for at, key in enumerate(chain):
        index.publish(index.reserve([key], chain[at - 1] if at else None)[1])
    index.check()
    assert len(index._segments.by_first_slot) == 4
    assert index.access(chain, 0) == 1000
    index.publish(index.reserve([b"x", b"y"], None)[1])
    index.check()
    assert index.access(chain, 0) == 998


def test_a_block_in_the_middle_is_dropped_alone() -> None:
    index, chain = index_of(9), chain_of(9)
    index.publish(index.reserve(chain, None)[1])
    index.drop(chain[4:5])
    index.check()
    assert index.access(chain, 0) == 4
    index.publish(index.reserve(chain[4:5], chain[3])[1])
    index.check()
    assert index.access(chain, 0) == 9


class Confused(Fifo):
    """Offers what is on its way."""

    took = -1

    def evict(self, count: int, take: Take) -> None:
        self.took = take([b"a"])
        super().evict(count, take)


def test_what_is_being_filled_cannot_be_taken() -> None:
    policy = Confused(2)
    index = Index(policy, map(float, itertools.count()).__next__)
    index.open_slots(2)
    _, slots = index.reserve([b"a"], None)
    assert index.reserve([b"x", b"y"], None)[0] == [0]
    assert policy.took == 0
    index.publish(slots)
    index.check()
    assert b"a" in index


def test_a_stretch_that_ends_is_counted_no_more() -> None:
    stretches = SegmentTable()
    for name in (b"x", b"y"):
        stretches.add((name,), (int(name == b"y"),), b"parent")
    assert stretches.child_counts == {b"parent": 2}
    assert stretches.remove(b"x") == 0
    assert stretches.child_counts == {b"parent": 1}
    assert stretches.remove(b"y") == 1
    assert stretches.child_counts == {}
    stretches.check()


@pytest.mark.parametrize("policy", [Lru, Gittins])
def test_what_leaves_is_gone_without_a_garbage_collection(policy: type[Policy]) -> None:
    replay = Replay(policy, 200, 16)
    gc.collect()
    gc.disable()
    try:
        replay.play(GENERATORS["chat"](1000))
        assert replay.index.evicted_blocks > 10 * 200
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="every dictionary is looked at there")
def test_garbage_collections_do_not_look_at_every_block() -> None:
    replay = Replay(Gittins, 200, 16)
    replay.play(GENERATORS["chat"](1000))
    assert isinstance(replay.policy, Gittins)
    gc.collect()
    assert not gc.is_tracked(replay.index._segments.first_slots)
    assert not gc.is_tracked(replay.policy.run_ids)
    stretches, runs = replay.index._segments.by_first_slot.values(), replay.policy.runs.values()
    assert not any(gc.is_tracked(each.keys) or gc.is_tracked(each.slots) for each in stretches)
    assert not any(gc.is_tracked(run.keys) for run in runs)
