"""The logged events of a tier, replayed, give exactly the blocks that it holds."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from kvcache import Stack
from kvcache.events import BlockEvent, BlockEventLog
from kvcache.keys import namespaced_key
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from kvcache.tiers.dram import DramTier
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest


def replay(held: set[bytes], events: list[BlockEvent]) -> None:
    """Apply `events` to `held`: only absent blocks are stored, only held ones removed."""
    for stored, keys in events:
        if keys is None:
            held.clear()
        elif stored:
            assert not held.intersection(keys)
            held.update(keys)
        else:
            assert held.issuperset(keys)
            held.difference_update(keys)


def test_front_tier_events_match_the_held_blocks() -> None:
    random = Random(7)
    chains = [keys_of(f"chain {n}", 8) for n in range(6)]
    every_key = list(itertools.chain.from_iterable(chains))
    front = DramTier(block_nbytes=PAGE, capacity=Size(12 * PAGE))
    front.slab.wait_populated()
    with Stack(front, profile="test") as stack:
        [(named, log)] = stack.subscribe_events()
        assert named.name == "l1"
        held: set[bytes] = set()
        for step in range(300):
            chain = random.choice(chains)
            end = random.randrange(1, len(chain) + 1)
            lease = stack.reserve(chain[:end])
            if step % 50 == 49:
                stack.clear()  # during the lease, which then publishes nothing
            lease.end(failed=lease.keys[-1:] if step % 5 == 0 else ())
            read = stack.fetch_local(chain)
            read.end(failed=read.keys[1:] if step % 7 == 0 else ())
            replay(held, log.take())
            assert held == {key for key in every_key if front.contains([key]) == [True]}
        assert stack.stats().tiers[0].evicted_blocks
        assert stack.stats().tiers[0].dropped_blocks


def test_lower_tier_events_match_its_answers() -> None:
    below = StackUnderTest(blocks_per_call=8)
    keys, more = keys_of("a", 4), keys_of("b", 2)
    with below.stack:
        [_, (named, log)] = below.stack.subscribe_events()
        assert named.name == "l2"
        below.put(keys)
        assert below.stack.flush(LONG)
        stored = [each for each in log.take() if each.stored]
        assert [list(each.keys or ()) for each in stored] == [keys]

        below.front.clear()
        del below.tiers[0].held[
            namespaced_key(NAMESPACE, keys[2])
        ]  # the tier removes it without notice
        assert log.take() == []
        below.put_in_tier(more)
        assert below.fetch_count(keys) == 2
        removed = {key for event in log.take() if not event.stored for key in event.keys or ()}
        assert removed == {keys[2]}

        assert below.fetch_count(more) == 2  # stored by another engine
        assert more in [change.keys for change in log.take() if change.stored]

        below.stack.clear()
        assert log.take() == [BlockEvent(stored=False, keys=None)]


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_tier_that_is_not_announced_logs_no_event(front: bool, lower: bool) -> None:
    below = StackUnderTest(announce_front=front, announce=lower)
    with below.stack:
        logs = {named.name: log for named, log in below.stack.subscribe_events()}
        assert list(logs) == ["l1"] * front + ["l2"] * lower
        assert below.stack.announces == (front or lower)
        below.put(keys_of("a", 2))
        assert below.stack.flush(LONG)
        below.stack.clear()
        for log in logs.values():
            *before, last = log.take()
            assert any(event.stored for event in before)
            assert last == BlockEvent(stored=False, keys=None)


def test_lower_tier_failure_logs_no_event() -> None:
    below = StackUnderTest()
    keys = keys_of("a", 2)
    below.put_in_tier(keys)
    with below.stack:
        [_, (_, log)] = below.stack.subscribe_events()
        for fault in ("raise", "count"):
            below.tiers[0].fault = fault
            assert below.fetch_count(keys) == 0
            assert log.take() == []


def test_lower_tier_answer_older_than_a_clear_logs_no_event() -> None:
    below = StackUnderTest()
    keys = keys_of("a", 2)
    below.put_in_tier(keys)
    tier = below.tiers[0]
    with below.stack:
        [_, (_, log)] = below.stack.subscribe_events()
        tier.gate.clear()
        match = below.stack.match(keys)
        assert tier.waiting.acquire(timeout=LONG)
        below.stack.clear()
        tier.gate.set()
        match.result(LONG)
        assert log.take() == [BlockEvent(stored=False, keys=None)]


def test_log_ignores_empty_and_mismatched_calls() -> None:
    log = BlockEventLog()
    log.stored([])
    log.removed([])
    log.observed([], [])
    log.observed([b"k"], [True, True])  # the answers cannot be matched to keys
    assert log.take() == []
