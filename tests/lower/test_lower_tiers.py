"""Tiers below L1: what comes up is right or does not come, what goes down is counted."""

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from kvcache import Match
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from tests.support.stack_under_test import LONG, NAMESPACE, NEVER, StackUnderTest


@pytest.fixture
def below() -> Iterator[StackUnderTest]:
    below = StackUnderTest()
    yield below
    assert below.stack.flush(LONG)
    below.check_invariants()
    below.stack.close()


def test_what_an_engine_stored_goes_down_and_comes_up_again(below: StackUnderTest) -> None:
    keys = keys_of("a", 4)
    below.put(keys)
    assert below.stack.flush(LONG)
    assert below.tiers[0].held == {NAMESPACE + key: block_of(key, PAGE) for key in keys}
    below.front.clear()
    assert below.fetch_count(keys) == 4
    stats = below.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.hit_blocks, stats.loaded_blocks) == (4, 4, 4)


def test_what_failed_does_not_go_down_and_the_rest_does(below: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    below.stack.reserve(keys).end(failed=keys[1:2])
    assert below.stack.flush(LONG)
    assert set(below.tiers[0].held) == {NAMESPACE + keys[0], NAMESPACE + keys[2]}
    assert below.stack.stats().lower[0].dropped_blocks == 0


def test_what_came_up_does_not_go_down_and_the_known_is_not_written(below: StackUnderTest) -> None:
    keys = keys_of("a", 4)
    below.put_in_tier(keys[:2])
    assert below.fetch_count(keys) == 2
    assert below.stack.flush(LONG)
    assert "store" not in below.tiers[0].calls
    below.front.clear()
    below.put(keys)
    assert below.stack.flush(LONG)
    stats = below.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.known_blocks) == (2, 2)


def test_a_block_is_read_again_after_a_clear_while_it_is_on_its_way(below: StackUnderTest) -> None:
    keys = keys_of("a", 2)
    below.put_in_tier(keys)
    below.tiers[0].gate.clear()
    first = below.stack.fetch(Match(keys, 0, 2, (1, 1)))
    assert below.tiers[0].waiting.acquire(timeout=LONG)
    below.stack.clear()
    second = below.stack.fetch(Match(keys, 0, 2, (1, 1)))
    assert below.tiers[0].waiting.acquire(timeout=LONG)
    below.tiers[0].gate.set()
    first.result(LONG).end()
    second.result(LONG).end()
    assert below.stack.lower._reads_in_flight == {}
    assert below.stack.stats().lower[0].errors == 0


def test_nobody_below_is_asked_for_what_l1_has(below: StackUnderTest) -> None:
    keys = keys_of("a", 4)
    below.put(keys)
    assert below.stack.flush(LONG)
    below.tiers[0].calls.clear()
    match = below.stack.match(keys)
    assert match.done()
    fetched = below.stack.fetch(match.result())
    assert fetched.done()
    fetched.result().end()
    assert below.stack.prefetch(keys) is None
    assert below.tiers[0].calls == []


def test_parts_in_l1_and_below_make_one_prefix(below: StackUnderTest) -> None:
    keys = keys_of("a", 9)
    below.put(keys[:2])
    below.put(keys[4:6], keys[3])
    assert below.stack.flush(LONG)
    below.put_in_tier([*keys[2:4], *keys[6:8]])
    assert below.fetch_count(keys) == 8
    assert below.fetch_count(keys, 5) == 3


def test_the_answer_is_cut_at_the_first_hole() -> None:
    below = StackUnderTest(tiers=2)
    keys = keys_of("a", 9)
    below.put_in_tier(keys[:3], 0)
    below.put_in_tier([keys[3], *keys[5:]], 1)
    match = below.stack.match(keys).result(LONG)
    assert (match.blocks, match.sources) == (4, (1, 1, 1, 2))
    assert below.fetch_count(keys) == 4
    below.tiers[1].held.clear()
    below.front.clear()
    assert below.fetch_count(keys) == 3
    below.check_invariants()
    below.stack.close()


@pytest.mark.parametrize(
    ("fault", "comes"), [("hole", 1), ("short", 0), ("raise", 0), ("count", 0)]
)
def test_faults_are_misses(below: StackUnderTest, fault: str, comes: int) -> None:
    keys = keys_of("a", 3)
    below.put_in_tier(keys)
    match = below.stack.match(keys).result(LONG)
    below.tiers[0].fault = fault
    with below.stack.fetch(match).result(LONG) as lease:
        assert len(lease) == comes
        assert all(
            bytes(v) == block_of(k, PAGE) for k, v in zip(lease.keys, lease.views, strict=True)
        )
    below.tiers[0].fault = ""
    assert below.fetch_count(keys) == 3


def test_a_tier_that_lies_about_what_it_has(below: StackUnderTest) -> None:
    below.tiers[0].fault = "lie"
    keys = keys_of("a", 3)
    assert below.stack.match(keys).result(LONG).blocks == 3
    assert below.fetch_count(keys) == 0
    assert below.stack.stats().lower[0].missed_blocks == 3


def test_of_two_who_want_a_block_one_reads_it(below: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    below.put_in_tier(keys)
    matches = [below.stack.match(keys).result(LONG) for _ in range(4)]
    below.tiers[0].gate.clear()
    fetches = [below.stack.fetch(match) for match in matches]
    below.tiers[0].waiting.acquire(timeout=LONG)
    below.tiers[0].gate.set()
    for fetch in fetches:
        with fetch.result(LONG) as lease:
            assert list(lease.keys) == keys
    assert sorted(below.tiers[0].read) == sorted(NAMESPACE + key for key in keys)


def test_room_is_not_made_of_what_was_matched() -> None:
    below = StackUnderTest(slots=4)
    keys = keys_of("a", 6)
    below.put(keys[:3])
    assert below.stack.flush(LONG)
    below.put_in_tier(keys[3:])
    assert below.fetch_count(keys) == 4  # there is room for one more, and none of the three goes
    below.check_invariants()
    below.stack.close()


def test_a_call_that_comes_late_keeps_its_memory_until_it_ends() -> None:
    below = StackUnderTest(slots=2, breaker_failures=NEVER)
    keys, others = keys_of("a", 2), keys_of("b", 2)
    below.put_in_tier(keys)
    match = below.stack.match(keys).result(LONG)
    below.hang_load(match)
    assert below.put(others) == 0  # both slots may yet be written
    below.tiers[0].gate.set()
    [lower] = below.lower
    done = threading.Event()
    lower.channel.workers.add_job(0, done.set)  # behind the call that was late
    lower.channel.workers.add_job(0, done.set)
    assert done.wait(LONG)
    while below.stack.stats().pinned_slots:
        pass
    assert below.stack.match(keys).result(LONG).blocks == 2
    below.check_invariants()
    below.stack.close()


def test_a_call_that_never_began_keeps_nothing() -> None:
    below = StackUnderTest(slots=4, calls=1, breaker_failures=NEVER)
    first, second = keys_of("a", 2), keys_of("b", 2)
    below.put_in_tier(first + second)
    matches = [below.stack.match(keys).result(LONG) for keys in (first, second)]
    below.hang_load(matches[0])
    below.lower[0].channel.deadline_s = 0.01
    with below.stack.fetch(matches[1]).result(LONG) as lease:  # it waits behind the other
        assert not lease.keys
    assert below.stack.stats().pinned_slots == 2
    below.tiers[0].gate.set()
    below.stack.close()


def test_a_tier_that_hangs_for_ever_stops_nobody() -> None:
    below = StackUnderTest(deadline_s=0.01)
    below.lower[0].channel.health.breaker._clock = lambda: 0.0
    below.tiers[0].gate.clear()
    keys = keys_of("a", 4)
    for _ in range(5):
        assert below.fetch_count(keys) == 0
    assert below.stack.match(keys).done()  # it is not asked any more
    below.put(keys)
    assert below.fetch_count(keys) == 4
    stats = below.stack.stats().lower[0]
    assert stats.errors >= 3
    assert stats.dropped_blocks == 4
    below.stack.close(flush_s=0.01)
    below.tiers[0].gate.set()


def test_a_tier_that_recovers_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    below = StackUnderTest()
    now = 0.0
    [lower] = below.lower
    lower.channel.health.breaker._clock = lambda: now
    keys = keys_of("a", 2)
    below.put_in_tier(keys)
    below.tiers[0].fault = "raise"
    for _ in range(3):
        assert below.fetch_count(keys) == 0
    assert "circuit breaker opened (" in caplog.text
    below.tiers[0].fault = ""
    assert below.fetch_count(keys) == 0
    now = 1.0
    assert below.fetch_count(keys) == 2
    assert "tier l2: circuit breaker closed" in caplog.text
    below.check_invariants()
    below.stack.close()


def test_a_tier_may_take_only_what_is_used_again() -> None:
    below = StackUnderTest(writes="hot")
    keys = keys_of("a", 5)
    below.put(keys)
    assert below.stack.stats().lower[0].withheld_blocks == 5
    assert below.fetch_count(keys[:3]) == 3
    assert below.stack.flush(LONG)
    assert set(below.tiers[0].held) == {NAMESPACE + key for key in keys[:3]}
    assert below.fetch_count(keys) == 5
    assert below.stack.flush(LONG)
    stats = below.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.known_blocks, stats.withheld_blocks) == (5, 0, 0)
    for name in range(10):
        below.put(keys_of(f"other {name}", 4))
    assert len(below.lower[0].write_behind._withheld) <= 16
    below.check_invariants()
    below.stack.close()


def test_what_waits_to_be_written_is_bounded_and_the_tail_is_dropped() -> None:
    below = StackUnderTest(slots=16, blocks_per_call=1)  # a quarter of L1 may wait: 4 blocks
    below.tiers[0].gate.clear()
    keys = keys_of("a", 10)
    below.put(keys)
    stats = below.stack.stats()
    assert stats.lower[0].dropped_blocks == 6
    assert stats.lower[0].queued_nbytes == 4 * PAGE
    assert stats.pinned_slots == 4
    below.tiers[0].gate.set()
    assert below.stack.flush(LONG)
    assert set(below.tiers[0].held) == {NAMESPACE + key for key in keys[:4]}
    below.check_invariants()
    below.stack.close()


def test_closing_writes_what_waits_and_counts_what_it_could_not() -> None:
    below = StackUnderTest()
    below.put(keys_of("a", 4))
    below.stack.close()
    assert len(below.tiers[0].held) == 4
    assert below.tiers[0].closed

    below = StackUnderTest(deadline_s=0.01, blocks_per_call=1, calls=1)
    below.tiers[0].gate.clear()
    below.put(keys_of("a", 4))
    below.tiers[0].waiting.acquire(timeout=LONG)
    below.stack.close(flush_s=0.01)
    assert below.stack.stats().lower[0].dropped_blocks == 3  # the fourth is under way
    below.tiers[0].gate.set()


def test_after_a_clear_nothing_of_before_is_found(below: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    below.put(keys)
    assert below.stack.flush(LONG)
    below.stack.clear()
    assert below.fetch_count(keys) == 0
    below.put(keys)
    assert below.stack.flush(LONG)
    below.front.clear()
    assert below.fetch_count(keys) == 3
    assert len(below.tiers[0].held) == 6


def test_a_clear_between_reserve_and_end_keeps_the_old_out_of_the_new(
    below: StackUnderTest,
) -> None:
    keys = keys_of("a", 2)
    lease = below.stack.reserve(keys)
    below.stack.clear()
    lease.end()
    assert below.stack.flush(LONG)
    assert below.fetch_count(keys) == 0


def test_prefetch_brings_up_and_promises_nothing(below: StackUnderTest) -> None:
    keys = keys_of("a", 3)
    below.put_in_tier(keys)
    coming = below.stack.prefetch([*keys, b"unknown"])
    assert coming is not None
    coming.result(LONG)
    assert below.stack.stats().pinned_slots == 0
    with below.stack.fetch_local(keys) as lease:
        assert list(lease.keys) == keys


def test_many_threads_and_a_tier_with_faults() -> None:
    below = StackUnderTest(slots=12, blocks_per_call=2)
    heads = [keys_of(f"head {at}", 3) for at in range(3)]
    chains = [heads[at % 3] + keys_of(f"tail {at}", 5) for at in range(10)]
    begin = threading.Barrier(6)

    def user(seed: int) -> int:
        choose, fetched = random.Random(seed), 0
        begin.wait()
        for _ in range(80):
            keys = choose.choice(chains)
            have = below.fetch_count(keys)
            fetched += have
            below.tiers[0].fault = choose.choice(["", "", "", "hole", "short", "raise", "decline"])
            with suppress(ZeroDivisionError):
                below.put(keys[have:], keys[have - 1] if have else None)
        return fetched

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(user, range(6))) > 0
    below.tiers[0].fault = ""
    assert below.stack.flush(LONG)
    below.check_invariants()
    stats = below.stack.stats()
    down = stats.lower[0]
    assert (
        down.stored_blocks + down.known_blocks + down.declined_blocks + down.dropped_blocks
        == stats.tiers[0].stored_blocks - down.loaded_blocks
    )
    below.stack.close()


def test_a_tier_is_told_what_a_stretch_continues() -> None:
    below = StackUnderTest(slots=64)
    told: list[tuple[list[bytes], bytes | None]] = []
    store = below.tiers[0].store

    def noted(
        keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        told.append((list(keys), parent))
        return store(keys, blocks, parent)

    below.tiers[0].store = noted  # type: ignore[method-assign]
    keys = keys_of("a", 9)
    names = [NAMESPACE + key for key in keys]
    below.put(keys[:2])
    assert below.stack.flush(LONG)
    below.put(keys[2:3], keys[1])  # the next step of the engine
    below.put_in_tier(keys[4:5])
    assert below.stack.flush(LONG)
    below.put(keys[3:], keys[2])  # in pieces of four, with one that is known
    assert below.stack.flush(LONG)
    assert told == [
        (names[:2], None),
        (names[2:3], names[1]),
        (names[3:4], names[2]),
        (names[5:7], names[4]),
        (names[7:9], names[6]),
    ]
    below.stack.close()
