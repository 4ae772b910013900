"""What is written down of the blocks that come and leave is what a tier holds."""

from __future__ import annotations

from random import Random

from kvcache import Stack
from kvcache.events import BlockEvent, BlockEventLog
from kvcache.keys import namespaced_key
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from kvcache.tiers.dram import DramTier
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest


def replay(held: set[bytes], changes: list[BlockEvent]) -> None:
    """Follow `changes`: what comes was not there, and what leaves was."""
    for came, keys in changes:
        if keys is None:
            held.clear()
        elif came:
            assert not held.intersection(keys)
            held.update(keys)
        else:
            assert held.issuperset(keys)
            held.difference_update(keys)


def test_l1_tells_of_all_that_comes_and_leaves() -> None:
    random = Random(7)
    chains = [keys_of(f"chain {n}", 8) for n in range(6)]
    front = DramTier(block_nbytes=PAGE, capacity=Size(12 * PAGE))
    front.slab.wait_populated()
    with Stack(front, profile="test") as stack:
        [(named, journal)] = stack.subscribe_events()
        assert named.name == "l1"
        held: set[bytes] = set()
        for step in range(300):
            chain = random.choice(chains)
            end = random.randrange(1, len(chain) + 1)
            lease = stack.reserve(chain[:end])
            if step % 50 == 49:
                stack.clear()  # under a lease, which then publishes nothing
            lease.end(failed=lease.keys[-1:] if step % 5 == 0 else ())
            read = stack.fetch_local(chain)
            read.end(failed=read.keys[1:] if step % 7 == 0 else ())
            replay(held, journal.take())
            assert held == set(front._index.ready())
        assert stack.stats().tiers[0].evicted_blocks
        assert stack.stats().tiers[0].dropped_blocks


def test_a_lower_tier_tells_what_it_says_it_holds() -> None:
    below = StackUnderTest(blocks_per_call=8)
    keys, more = keys_of("a", 4), keys_of("b", 2)
    with below.stack:
        [_, (named, journal)] = below.stack.subscribe_events()
        assert named.name == "l2"
        below.put(keys)
        assert below.stack.flush(LONG)
        came = [each for each in journal.take() if each.stored]
        assert [list(each.keys or ()) for each in came] == [keys]

        below.front.clear()
        del below.tiers[0].held[namespaced_key(NAMESPACE, keys[2])]  # by itself: nobody is told
        assert journal.take() == []
        below.put_in_tier(more)
        assert below.fetch_count(keys) == 2
        left = {key for came, gone in journal.take() if not came for key in gone or ()}
        assert left == {keys[2]}

        assert below.fetch_count(more) == 2  # another engine's
        assert more in [change.keys for change in journal.take() if change.stored]

        below.stack.clear()
        assert journal.take() == [BlockEvent(stored=False, keys=None)]


def test_what_a_lower_tier_does_not_answer_is_not_told() -> None:
    below = StackUnderTest()
    keys = keys_of("a", 2)
    below.put_in_tier(keys)
    with below.stack:
        [_, (_, journal)] = below.stack.subscribe_events()
        for fault in ("raise", "count"):
            below.tiers[0].fault = fault
            assert below.fetch_count(keys) == 0
            assert journal.take() == []


def test_an_answer_from_before_a_clear_is_not_told() -> None:
    below = StackUnderTest()
    keys = keys_of("a", 2)
    below.put_in_tier(keys)
    tier = below.tiers[0]
    with below.stack:
        [_, (_, journal)] = below.stack.subscribe_events()
        tier.gate.clear()
        asked = below.stack.match(keys)
        assert tier.waiting.acquire(timeout=LONG)
        below.stack.clear()
        tier.gate.set()
        asked.result(LONG)
        assert journal.take() == [BlockEvent(stored=False, keys=None)]


def test_a_journal_keeps_nothing_of_nothing() -> None:
    journal = BlockEventLog()
    journal.stored([])
    journal.removed([])
    journal.observed([], [])
    journal.observed([b"k"], [True, True])  # no telling which is whose
    assert journal.take() == []
