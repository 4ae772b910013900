"""``lookup = "load"``: the tier is asked nothing; a load finds out what it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvcache import telemetry
from kvcache.lower.remembered import MISS_S, RememberedBlocks
from kvcache.resume import Needs
from kvcache.testing import keys_of
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest, check_resume, put_branches
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest
from tests.support.timed_tier import TimedTier

WINDOW, STATE = Needs("window", 6), Needs("state")


class LoadingStack(StackUnderTest):
    """A stack over one tier with ``lookup = "load"``, in calls of four blocks."""

    def __init__(self, slots: int = 64) -> None:
        self.clock = ManualClock(100.0)
        self.tier = TimedTier(self.clock)
        super().__init__(slots=slots, tiers=[self.tier], clock=self.clock, lookup="load")

    def read(self) -> list[bytes]:
        """Return the keys that the tier was asked for since the last call."""
        keys = [name.removeprefix(NAMESPACE) for name in self.tier.read]
        self.tier.read.clear()
        return keys

    def prefetch_resume(self, request: GroupedRequest, top: int) -> None:
        future = self.stack.prefetch_resume(request.groups, top, BLOCK_TOKENS)
        assert future is not None
        future.result(LONG)

    def put_groups_below(self, request: GroupedRequest, blocks: int, kept: list[int]) -> None:
        """Have the tier hold blocks of the chain, and the side blocks of the blocks ``kept``."""
        for branches in request.branches(0, blocks, kept):
            for keys, _ in branches:
                self.put_in_tier(list(keys))


@pytest.fixture
def under_test() -> Iterator[LoadingStack]:
    under_test = LoadingStack()
    yield under_test
    assert under_test.stack.flush(LONG)
    under_test.check_invariants()
    assert "contains" not in under_test.tier.calls
    stats = under_test.stack.stats()
    [l1], [l2] = stats.tiers, stats.lower
    accounted = l2.stored_blocks + l2.known_blocks + l2.declined_blocks + l2.dropped_blocks
    assert accounted + l2.withheld_blocks == l1.stored_blocks - l2.loaded_blocks
    assert (l2.lookup_blocks, l2.missed_blocks) == (under_test.tier.requested_blocks, 0)
    assert l2.hit_blocks == l2.loaded_blocks
    under_test.stack.close()


# Promotion


def test_match_assumes_every_block_and_fetch_returns_those_held(under_test: LoadingStack) -> None:
    keys = keys_of("a", 30)
    under_test.put_in_tier(keys[:5])
    match = under_test.stack.match(keys).result(LONG)
    assert (match.blocks, match.sources) == (30, (1,) * 30)
    assert under_test.read() == []
    assert under_test.fetch_count(keys) == 5
    assert sorted(under_test.read()) == sorted(keys[:12])  # the third batch was queued
    [stats] = under_test.stack.stats().lower
    assert (stats.lookup_blocks, stats.hit_blocks, stats.loaded_blocks) == (12, 5, 5)


def test_prompt_that_the_tier_lacks_costs_one_batch(under_test: LoadingStack) -> None:
    keys = keys_of("cold", 60)
    assert under_test.fetch_count(keys) == 0
    assert under_test.read() == keys[:4]
    assert under_test.tier.calls == ["load"]


def test_first_batch_of_small_blocks_has_sixteen(under_test: LoadingStack) -> None:
    under_test.lower[0].channel.blocks_per_call = 40
    cold, held = keys_of("cold", 60), keys_of("held", 60)
    assert under_test.fetch_count(cold) == 0
    assert under_test.read() == cold[:16]
    under_test.tier.calls.clear()
    under_test.put_in_tier(held)
    assert under_test.fetch_count(held) == 60
    assert under_test.tier.calls == ["load"] * 3  # of 16, 40 and 4 blocks


def test_long_prompt_that_the_tier_holds_is_loaded_whole(under_test: LoadingStack) -> None:
    keys = keys_of("long", 60)
    under_test.put_in_tier(keys)
    assert under_test.fetch_count(keys) == 60


def test_missed_block_is_asked_for_again_after_some_seconds(under_test: LoadingStack) -> None:
    keys = keys_of("late", 3)
    assert under_test.fetch_count(keys) == 0
    under_test.put_in_tier(keys)
    assert under_test.fetch_count(keys) == 0
    assert under_test.read() == keys
    assert under_test.stack.match(keys).result(LONG).blocks == 0
    under_test.clock.advance(MISS_S)
    assert under_test.fetch_count(keys) == 3


def test_missed_block_is_found_once_it_was_stored(under_test: LoadingStack) -> None:
    keys = keys_of("own", 3)
    assert under_test.fetch_count(keys) == 0
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.front.clear()
    assert under_test.fetch_count(keys) == 3


def test_failed_load_is_not_remembered_as_a_miss(under_test: LoadingStack) -> None:
    keys = keys_of("a", 3)
    under_test.put_in_tier(keys)
    under_test.tier.fault = "raise"
    assert under_test.fetch_count(keys) == 0
    under_test.tier.fault = ""
    assert under_test.fetch_count(keys) == 3


def test_requests_that_wait_for_a_read_stop_where_it_missed(under_test: LoadingStack) -> None:
    keys = keys_of("cold", 40)
    under_test.tier.gate.clear()
    matches = [under_test.stack.match(keys).result(LONG) for _ in range(3)]
    fetches = [under_test.stack.fetch(match) for match in matches]
    assert under_test.tier.waiting.acquire(timeout=LONG)
    under_test.tier.gate.set()
    for fetch in fetches:
        fetch.result(LONG).end()
    assert set(under_test.read()) == set(keys[:4])


def test_second_tier_is_asked_for_what_the_first_one_missed() -> None:
    under_test = StackUnderTest(tiers=2, lookup="load")
    keys = keys_of("a", 3)
    under_test.put_in_tier(keys, 1)
    assert under_test.fetch_count(keys) == 0
    assert under_test.fetch_count(keys) == 3
    under_test.stack.close()


# Write-behind


def test_block_that_this_process_stored_or_loaded_is_known(under_test: LoadingStack) -> None:
    stored, loaded, unknown = keys_of("stored", 3), keys_of("loaded", 2), keys_of("unknown", 4)
    under_test.put(stored)
    assert under_test.stack.flush(LONG)
    under_test.put_in_tier([*loaded, *unknown])
    assert under_test.fetch_count(loaded) == 2
    under_test.front.clear()
    for keys in (stored, loaded, unknown):
        under_test.put(keys)
    assert under_test.stack.flush(LONG)
    [stats] = under_test.stack.stats().lower
    assert (stats.known_blocks, stats.stored_blocks) == (5, 7)


def test_block_that_the_tier_lost_is_written_again(under_test: LoadingStack) -> None:
    keys = keys_of("lost", 3)
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.tier.held.clear()
    under_test.front.clear()
    assert under_test.fetch_count(keys) == 0
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    assert set(under_test.tier.held) == {NAMESPACE + key for key in keys}


def test_declined_block_is_not_known(under_test: LoadingStack) -> None:
    keys = keys_of("declined", 3)
    under_test.tier.fault = "decline"
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.tier.fault = ""
    under_test.front.clear()
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    [stats] = under_test.stack.stats().lower
    assert (stats.declined_blocks, stats.known_blocks, stats.stored_blocks) == (3, 0, 3)


def test_clear_forgets_what_is_known_and_missed(under_test: LoadingStack) -> None:
    keys, others = keys_of("a", 3), keys_of("b", 3)
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    assert under_test.fetch_count(others) == 0
    under_test.stack.clear()
    under_test.read()
    assert under_test.fetch_count(others) == 0
    assert len(under_test.read()) == 3
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    assert under_test.stack.stats().lower[0].known_blocks == 0


# Load or compute


def test_tier_that_loads_slower_than_computing_is_skipped(under_test: LoadingStack) -> None:
    under_test.tier.load_s = 0.2
    under_test.stack.observe_compute(1, 0.1)
    under_test.stack.observe_compute(100, 10.0)
    keys, others = keys_of("a", 4), keys_of("b", 4)
    under_test.put_in_tier([*keys, *others])
    assert under_test.fetch_count(keys) == 4  # nothing was measured yet
    assert under_test.lower[0].claim_remeasure()  # so that no remeasurement is due
    under_test.read()
    assert under_test.fetch_count(others) == 0
    assert under_test.read() == []
    assert under_test.stack.stats().lower[0].skipped_blocks == 4


def test_tier_that_misses_slower_than_computing_is_skipped(under_test: LoadingStack) -> None:
    under_test.tier.load_s = 0.2
    under_test.stack.observe_compute(1, 0.1)
    under_test.stack.observe_compute(100, 10.0)
    assert under_test.fetch_count(keys_of("a", 4)) == 0
    assert under_test.lower[0].claim_remeasure()  # so that no remeasurement is due
    under_test.read()
    assert under_test.fetch_count(keys_of("b", 4)) == 0
    assert under_test.read() == []


def test_fast_miss_leaves_the_measured_load_as_it_is(under_test: LoadingStack) -> None:
    under_test.stack.observe_compute(1, 0.1)
    under_test.stack.observe_compute(100, 10.0)
    under_test.tier.load_s = 0.09
    keys = keys_of("a", 4)
    under_test.put_in_tier(keys)
    assert under_test.fetch_count(keys) == 4
    before = under_test.lower[0].load_seconds(4)
    under_test.tier.load_s = 0.01
    assert under_test.fetch_count(keys_of("b", 4)) == 0
    assert under_test.lower[0].load_seconds(4) == before


# Groups


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sides", [(STATE,), (WINDOW,), (WINDOW, STATE), (Needs("chunk", 8),)])
def test_resume_point_of_an_earlier_turn_is_promoted(sides: tuple[Needs, ...], parts: int) -> None:
    under_test = LoadingStack(slots=300)
    request = GroupedRequest(*sides, parts=parts)
    under_test.put_groups_below(request, 9, list(range(9)))
    under_test.prefetch_resume(request, 30 * BLOCK_TOKENS)
    assert check_resume(under_test.stack, request, 0, 30 * BLOCK_TOKENS) == 9 * BLOCK_TOKENS
    under_test.check_invariants()
    under_test.stack.close()


def test_resume_point_before_missing_side_blocks_is_promoted(under_test: LoadingStack) -> None:
    request = GroupedRequest(STATE)
    under_test.put_groups_below(request, 9, [6])
    under_test.prefetch_resume(request, 12 * BLOCK_TOKENS)
    assert check_resume(under_test.stack, request, 0, 12 * BLOCK_TOKENS) == 7 * BLOCK_TOKENS


def test_resume_match_counts_blocks_of_earlier_tries_for_their_tier(
    under_test: LoadingStack,
) -> None:
    request = GroupedRequest(STATE)
    under_test.put_groups_below(request, 9, [6])
    future = under_test.stack.prefetch_resume(request.groups, 12 * BLOCK_TOKENS, BLOCK_TOKENS)
    assert future is not None
    match = future.result(LONG)
    assert (match.blocks, match.sources) == (7, (1,) * 7)


def test_resume_without_a_chain_group_is_promoted(under_test: LoadingStack) -> None:
    request = GroupedRequest(WINDOW, chain=False)
    under_test.put_groups_below(request, 5, list(range(5)))
    under_test.prefetch_resume(request, 7 * BLOCK_TOKENS)
    assert check_resume(under_test.stack, request, 0, 7 * BLOCK_TOKENS) == 5 * BLOCK_TOKENS


def test_resume_without_side_blocks_costs_a_bounded_number_of_calls(
    under_test: LoadingStack,
) -> None:
    request = GroupedRequest(STATE)
    under_test.put_groups_below(request, 50, [])
    under_test.prefetch_resume(request, 50 * BLOCK_TOKENS)
    assert check_resume(under_test.stack, request, 0, 50 * BLOCK_TOKENS) == 0
    assert len(under_test.tier.calls) <= 13 + 8  # the chain, and one for each try


def test_resume_in_a_tier_that_is_asked_is_tried_once() -> None:
    under_test = StackUnderTest(slots=64)
    request = GroupedRequest(STATE)
    put_branches(under_test.stack, *request.branches(0, 9))
    assert under_test.stack.flush(LONG)
    under_test.front.clear()
    under_test.tiers[0].calls.clear()
    under_test.tiers[0].fault = "hole"
    future = under_test.stack.prefetch_resume(request.groups, 9 * BLOCK_TOKENS, BLOCK_TOKENS)
    assert future is not None
    future.result(LONG)
    assert under_test.tiers[0].calls.count("load") == 3
    under_test.stack.close()


# What one sees of it


def test_spans_count_assumed_blocks_apart_from_hits(
    under_test: LoadingStack, exported: InMemorySpanExporter
) -> None:
    keys = keys_of("a", 6)
    under_test.put(keys[:1])
    under_test.put_in_tier(keys[1:3])
    assert under_test.fetch_count(keys) == 3
    spans = {span.name: dict(span.attributes or {}) for span in exported.get_finished_spans()}
    assert "kvcache.tier.contains" not in spans
    lookup, load = spans["kvcache.lookup"], spans["kvcache.tier.load"]
    assert (lookup["kvcache.block.hit"], lookup["kvcache.block.assumed"]) == (1, 5)
    assert (load["kvcache.block.requested"], load["kvcache.block.hit"]) == (5, 2)


def test_open_breaker_is_a_skipped_load_in_the_trace(
    under_test: LoadingStack, exported: InMemorySpanExporter
) -> None:
    under_test.tier.fault = "raise"
    keys = keys_of("a", 3)
    for _ in range(3):
        assert under_test.fetch_count(keys) == 0
    assert under_test.stack.match(keys).result(LONG).blocks == 0
    calls = len(under_test.tier.calls)
    parent = telemetry.start_span("parent", None)
    assert under_test.lower[0].contains(keys, parent) == [False] * 3
    [span] = [
        span
        for span in exported.get_finished_spans()
        if (span.attributes or {}).get("kvcache.skip.reason") == "breaker_open"
        and span.name == "kvcache.tier.load"
    ]
    assert (span.attributes or {})["kvcache.block.requested"] == 3
    assert len(under_test.tier.calls) == calls


def test_remembered_blocks_are_bounded_and_the_oldest_leave_first() -> None:
    remembered = RememberedBlocks(lambda: 0.0, limit=3)
    keys = keys_of("many", 5)
    remembered.observe(b"n", keys, [True] * 5)
    assert remembered.holds(b"n", keys) == [False, False, True, True, True]
    assert remembered.holds(b"m", keys) == [False] * 5
    remembered.observe(b"n", keys[2:3], [True])
    remembered.observe(b"n", keys[:1], [True])
    assert remembered.holds(b"n", keys) == [True, False, True, False, True]
    remembered.observe(b"n", keys, [False] * 5)
    assert remembered.holds(b"n", keys) == [False] * 5
    assert remembered.may_hold(b"n", keys) == [True, True, False, False, False]
