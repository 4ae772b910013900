"""Promotion and write-behind: right blocks or none, and counters that add up."""

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvcache import Match
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.worker_pool import LOAD
from tests.support.failing_parts import FaultyTier
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, NAMESPACE, NEVER, StackUnderTest


@pytest.fixture
def under_test() -> Iterator[StackUnderTest]:
    under_test = StackUnderTest()
    yield under_test
    assert under_test.stack.flush(LONG)
    under_test.check_invariants()
    under_test.stack.close()


# Promotion


def test_stored_blocks_are_written_to_the_tier_and_promoted_again(
    under_test: StackUnderTest,
) -> None:
    keys = keys_of("a", 4)
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    assert under_test.tiers[0].held == {NAMESPACE + key: block_of(key, PAGE) for key in keys}
    under_test.front.clear()
    assert under_test.fetch_count(keys) == 4
    stats = under_test.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.hit_blocks, stats.loaded_blocks) == (4, 4, 4)


def test_failed_blocks_are_not_written_and_the_others_are(under_test: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    under_test.stack.reserve(keys).end(failed=keys[1:2])
    assert under_test.stack.flush(LONG)
    assert set(under_test.tiers[0].held) == {NAMESPACE + keys[0], NAMESPACE + keys[2]}
    assert under_test.stack.stats().lower[0].dropped_blocks == 0


def test_promoted_and_known_blocks_are_not_written(under_test: StackUnderTest) -> None:
    keys = keys_of("a", 4)
    under_test.put_in_tier(keys[:2])
    assert under_test.fetch_count(keys) == 2
    assert under_test.stack.flush(LONG)
    assert "store" not in under_test.tiers[0].calls
    under_test.front.clear()
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    stats = under_test.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.known_blocks) == (2, 2)


def test_clear_during_a_promotion_lets_another_read_the_same_blocks(
    under_test: StackUnderTest,
) -> None:
    keys = keys_of("a", 2)
    under_test.put_in_tier(keys)
    under_test.tiers[0].gate.clear()
    first = under_test.stack.fetch(Match(keys, 0, 2, (1, 1)))
    assert under_test.tiers[0].waiting.acquire(timeout=LONG)
    under_test.stack.clear()
    second = under_test.stack.fetch(Match(keys, 0, 2, (1, 1)))
    assert under_test.tiers[0].waiting.acquire(timeout=LONG)
    under_test.tiers[0].gate.set()
    first.result(LONG).end()
    second.result(LONG).end()
    assert under_test.stack.lower.reads.in_flight == {}
    assert under_test.stack.stats().lower[0].errors == 0


def test_blocks_in_l1_are_matched_and_fetched_without_a_lower_tier(
    under_test: StackUnderTest,
) -> None:
    keys = keys_of("a", 4)
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.tiers[0].calls.clear()
    match = under_test.stack.match(keys)
    assert match.done()
    fetched = under_test.stack.fetch(match.result())
    assert fetched.done()
    fetched.result().end()
    assert under_test.stack.prefetch(keys) is None
    assert under_test.tiers[0].calls == []


def test_match_joins_blocks_of_l1_and_of_a_lower_tier(under_test: StackUnderTest) -> None:
    keys = keys_of("a", 9)
    under_test.put(keys[:2])
    under_test.put(keys[4:6], keys[3])
    assert under_test.stack.flush(LONG)
    under_test.put_in_tier([*keys[2:4], *keys[6:8]])
    assert under_test.fetch_count(keys) == 8
    assert under_test.fetch_count(keys, 5) == 3


def test_match_ends_at_the_first_block_that_no_tier_holds() -> None:
    under_test = StackUnderTest(tiers=2)
    keys = keys_of("a", 9)
    under_test.put_in_tier(keys[:3], 0)
    under_test.put_in_tier([keys[3], *keys[5:]], 1)
    match = under_test.stack.match(keys).result(LONG)
    assert (match.blocks, match.sources) == (4, (1, 1, 1, 2))
    assert under_test.fetch_count(keys) == 4
    under_test.tiers[1].held.clear()
    under_test.front.clear()
    assert under_test.fetch_count(keys) == 3
    under_test.check_invariants()
    under_test.stack.close()


@pytest.mark.parametrize(
    ("fault", "blocks"), [("hole", 1), ("short", 0), ("raise", 0), ("count", 0)]
)
def test_load_with_a_fault_is_a_miss(under_test: StackUnderTest, fault: str, blocks: int) -> None:
    keys = keys_of("a", 3)
    under_test.put_in_tier(keys)
    match = under_test.stack.match(keys).result(LONG)
    under_test.tiers[0].fault = fault
    with under_test.stack.fetch(match).result(LONG) as lease:
        assert len(lease) == blocks
        assert all(
            bytes(v) == block_of(k, PAGE) for k, v in zip(lease.keys, lease.views, strict=True)
        )
    under_test.tiers[0].fault = ""
    assert under_test.fetch_count(keys) == 3


def test_tier_that_reports_blocks_it_lacks_is_a_miss(under_test: StackUnderTest) -> None:
    under_test.tiers[0].fault = "lie"
    keys = keys_of("a", 3)
    assert under_test.stack.match(keys).result(LONG).blocks == 3
    assert under_test.fetch_count(keys) == 0
    assert under_test.stack.stats().lower[0].missed_blocks == 3


def test_several_fetches_of_a_block_read_it_once(under_test: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    under_test.put_in_tier(keys)
    matches = [under_test.stack.match(keys).result(LONG) for _ in range(4)]
    under_test.tiers[0].gate.clear()
    fetches = [under_test.stack.fetch(match) for match in matches]
    under_test.tiers[0].waiting.acquire(timeout=LONG)
    under_test.tiers[0].gate.set()
    for fetch in fetches:
        with fetch.result(LONG) as lease:
            assert list(lease.keys) == keys
    assert sorted(under_test.tiers[0].read) == sorted(NAMESPACE + key for key in keys)


def test_promotion_does_not_evict_matched_blocks() -> None:
    under_test = StackUnderTest(slots=4)
    keys = keys_of("a", 6)
    under_test.put(keys[:3])
    assert under_test.stack.flush(LONG)
    under_test.put_in_tier(keys[3:])
    assert under_test.fetch_count(keys) == 4  # the free slot and the three matched blocks
    under_test.check_invariants()
    under_test.stack.close()


def test_prefetch_promotes_and_pins_nothing(under_test: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    under_test.put_in_tier(keys)
    prefetched = under_test.stack.prefetch([*keys, b"unknown"])
    assert prefetched is not None
    prefetched.result(LONG)
    assert under_test.stack.stats().pinned_slots == 0
    with under_test.stack.fetch_local(keys) as lease:
        assert list(lease.keys) == keys


# Deadlines and the circuit breaker


def test_load_past_its_deadline_keeps_its_memory_until_it_ends() -> None:
    under_test = StackUnderTest(slots=2, breaker_failures=NEVER)
    keys, others = keys_of("a", 2), keys_of("b", 2)
    under_test.put_in_tier(keys)
    match = under_test.stack.match(keys).result(LONG)
    under_test.hang_load(match)
    assert under_test.put(others) == 0  # the load may still write to both slots
    under_test.tiers[0].gate.set()
    [lower] = under_test.lower
    reached = threading.Event()
    lower.channel.workers.add_job(LOAD, reached.set)  # runs after the late load
    lower.channel.workers.add_job(LOAD, reached.set)
    assert reached.wait(LONG)
    while under_test.stack.stats().pinned_slots:
        pass
    assert under_test.stack.match(keys).result(LONG).blocks == 2
    under_test.check_invariants()
    under_test.stack.close()


def test_load_that_never_began_keeps_no_memory() -> None:
    under_test = StackUnderTest(slots=4, calls=1, breaker_failures=NEVER)
    first, second = keys_of("a", 2), keys_of("b", 2)
    under_test.put_in_tier(first + second)
    matches = [under_test.stack.match(keys).result(LONG) for keys in (first, second)]
    under_test.hang_load(matches[0])
    under_test.lower[0].channel.deadline_s = 0.01
    with under_test.stack.fetch(matches[1]).result(LONG) as lease:  # queued behind the other
        assert not lease.keys
    assert under_test.stack.stats().pinned_slots == 2
    under_test.tiers[0].gate.set()
    under_test.stack.close()


def test_hanging_tier_is_not_called_after_three_deadlines() -> None:
    under_test = StackUnderTest(deadline_s=0.01, breaker_clock=lambda: 0.0)
    under_test.tiers[0].gate.clear()
    keys = keys_of("a", 4)
    for _ in range(5):
        assert under_test.fetch_count(keys) == 0
    assert under_test.stack.match(keys).done()  # the tier is not called any more
    under_test.put(keys)
    assert under_test.fetch_count(keys) == 4
    stats = under_test.stack.stats().lower[0]
    assert stats.errors >= 3
    assert stats.dropped_blocks == 4
    under_test.stack.close(flush_s=0.01)
    under_test.tiers[0].gate.set()


def test_tier_that_recovers_is_called_again(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    under_test = StackUnderTest(breaker_clock=clock)
    keys = keys_of("a", 2)
    under_test.put_in_tier(keys)
    under_test.tiers[0].fault = "raise"
    for _ in range(3):
        assert under_test.fetch_count(keys) == 0
    assert "kvcache: tier l2: circuit breaker opened (contains failed: OSError: " in caplog.text
    assert "; calls pause" in caplog.text
    under_test.tiers[0].fault = ""
    assert under_test.fetch_count(keys) == 0
    clock.now = 1.0
    assert under_test.fetch_count(keys) == 2
    assert "kvcache: tier l2: circuit breaker closed; calls resume" in caplog.text
    under_test.check_invariants()
    under_test.stack.close()


# Write-behind


def test_writes_hot_writes_only_blocks_that_are_used_again() -> None:
    under_test = StackUnderTest(writes="hot")
    keys = keys_of("a", 5)
    under_test.put(keys)
    assert under_test.stack.stats().lower[0].withheld_blocks == 5
    assert under_test.fetch_count(keys[:3]) == 3
    assert under_test.stack.flush(LONG)
    assert set(under_test.tiers[0].held) == {NAMESPACE + key for key in keys[:3]}
    assert under_test.fetch_count(keys) == 5
    assert under_test.stack.flush(LONG)
    stats = under_test.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.known_blocks, stats.withheld_blocks) == (5, 0, 0)
    for name in range(10):
        under_test.put(keys_of(f"other {name}", 4))
    assert len(under_test.lower[0].write_behind.withheld) <= 16
    under_test.check_invariants()
    under_test.stack.close()


def test_full_queue_drops_the_tail_of_the_chain() -> None:
    under_test = StackUnderTest(slots=16, blocks_per_call=1)  # a quarter of L1: 4 blocks
    under_test.tiers[0].gate.clear()
    keys = keys_of("a", 10)
    under_test.put(keys)
    stats = under_test.stack.stats()
    assert stats.lower[0].dropped_blocks == 6
    assert stats.lower[0].queued_nbytes == 4 * PAGE
    assert stats.pinned_slots == 4
    under_test.tiers[0].gate.set()
    assert under_test.stack.flush(LONG)
    assert set(under_test.tiers[0].held) == {NAMESPACE + key for key in keys[:4]}
    under_test.check_invariants()
    under_test.stack.close()


def test_close_writes_the_queue_and_counts_what_it_drops() -> None:
    under_test = StackUnderTest()
    under_test.put(keys_of("a", 4))
    under_test.stack.close()
    assert len(under_test.tiers[0].held) == 4
    assert under_test.tiers[0].closed

    under_test = StackUnderTest(deadline_s=0.01, blocks_per_call=1, calls=1)
    under_test.tiers[0].gate.clear()
    under_test.put(keys_of("a", 4))
    under_test.tiers[0].waiting.acquire(timeout=LONG)
    under_test.stack.close(flush_s=0.01)
    assert under_test.stack.stats().lower[0].dropped_blocks == 3  # the fourth is being written
    under_test.tiers[0].gate.set()


def test_clear_earlier_blocks_are_not_found(under_test: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.stack.clear()
    assert under_test.fetch_count(keys) == 0
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.front.clear()
    assert under_test.fetch_count(keys) == 3
    assert len(under_test.tiers[0].held) == 6


def test_clear_between_reserve_and_end_leaves_the_blocks_in_the_old_namespace(
    under_test: StackUnderTest,
) -> None:
    keys = keys_of("a", 2)
    lease = under_test.stack.reserve(keys)
    under_test.stack.clear()
    lease.end()
    assert under_test.stack.flush(LONG)
    assert under_test.fetch_count(keys) == 0


def test_store_gets_the_parent_of_each_run_of_blocks() -> None:
    stores: list[tuple[list[bytes], bytes | None]] = []

    class RecordingTier(FaultyTier):
        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            stores.append((list(keys), parent))
            return super().store(keys, blocks, parent)

    under_test = StackUnderTest(slots=64, tiers=[RecordingTier()])
    keys = keys_of("a", 9)
    names = [NAMESPACE + key for key in keys]
    under_test.put(keys[:2])
    assert under_test.stack.flush(LONG)
    under_test.put(keys[2:3], keys[1])  # the next step of the engine
    under_test.put_in_tier(keys[4:5])
    assert under_test.stack.flush(LONG)
    under_test.put(keys[3:], keys[2])  # two calls, one of them with a known block
    assert under_test.stack.flush(LONG)
    assert stores == [
        (names[:2], None),
        (names[2:3], names[1]),
        (names[3:4], names[2]),
        (names[5:7], names[4]),
        (names[7:9], names[6]),
    ]
    under_test.stack.close()


# Everything at once


def test_many_threads_over_a_faulty_tier_get_right_blocks_and_counters() -> None:
    under_test = StackUnderTest(slots=12, blocks_per_call=2)
    heads = [keys_of(f"head {at}", 3) for at in range(3)]
    chains = [heads[at % 3] + keys_of(f"tail {at}", 5) for at in range(10)]
    begin = threading.Barrier(6)

    def user(seed: int) -> int:
        choose, fetched = random.Random(seed), 0
        begin.wait()
        for _ in range(80):
            keys = choose.choice(chains)
            held = under_test.fetch_count(keys)
            fetched += held
            faults = ["", "", "", "hole", "short", "raise", "decline"]
            under_test.tiers[0].fault = choose.choice(faults)
            under_test.put(keys[held:], keys[held - 1] if held else None)
        return fetched

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(user, range(6))) > 0
    under_test.tiers[0].fault = ""
    assert under_test.stack.flush(LONG)
    under_test.check_invariants()
    stats = under_test.stack.stats()
    [l1], [l2] = stats.tiers, stats.lower
    accounted = l2.stored_blocks + l2.known_blocks + l2.declined_blocks + l2.dropped_blocks
    assert accounted == l1.stored_blocks - l2.loaded_blocks
    under_test.stack.close()
