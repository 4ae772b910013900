"""Promotion for a resume point: what is read, for which point, and what faults cost."""

import time
from collections.abc import Sequence

import pytest
from opentelemetry.trace import INVALID_SPAN

from kvcache.keys import Branch
from kvcache.lower.resume_promotion import promote_resume
from kvcache.resume import Needs
from tests.support.failing_parts import FaultyTier
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest, check_resume, put_branches
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest
from tests.support.timed_tier import TimedTier

WINDOW, STATE = Needs("window", 6), Needs("state")


class BranchRecorder(FaultyTier):
    """A tier that records the segments of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[list[Branch]] = []

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        self.stored.append(list(branches))
        return super().store_branches(branches, blocks)


def prefetch(under_test: StackUnderTest, request: GroupedRequest, top: int) -> int | None:
    """Prefetch for a request; return how many keys of the first group L1 then holds."""
    future = under_test.stack.prefetch_resume(request.groups, top, BLOCK_TOKENS)
    return None if future is None else future.result(LONG).blocks


def put_below(under_test: StackUnderTest, request: GroupedRequest, blocks: int) -> None:
    """Store blocks of all groups, wait until the lower tiers have them, and empty L1."""
    put_branches(under_test.stack, *request.branches(0, blocks))
    assert under_test.stack.flush(LONG)
    under_test.front.clear()
    under_test.overwrite_free_slots()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sides", [(WINDOW,), (STATE,), (WINDOW, STATE), (Needs("chunk", 8),)])
def test_prefetch_reads_only_what_the_hit_needs(sides: tuple[Needs, ...], parts: int) -> None:
    under_test = StackUnderTest(slots=200)
    under_test.lower[0].write_behind.queue_blocks = 200
    request = GroupedRequest(*sides, parts=parts)
    put_below(under_test, request, 9)
    assert prefetch(under_test, request, 35) == 8 * parts
    [tier] = under_test.tiers
    assert tier.read == [NAMESPACE + key for key in request.needed(0, 32)]
    assert check_resume(under_test.stack, request, 0, 35) == 32
    assert prefetch(under_test, request, 35) is None
    under_test.check_invariants()


def test_prefetch_reads_only_side_blocks_that_l1_lacks() -> None:
    under_test = StackUnderTest(slots=200)
    request = GroupedRequest(WINDOW, STATE)
    put_below(under_test, request, 5)
    put_branches(under_test.stack, request.branches(0, 4)[0])
    assert check_resume(under_test.stack, request, 0, 20) == 0
    assert prefetch(under_test, request, 20) == 5
    window, state = request.groups[1:]
    read = [request.key(0, 4), *window.keys(3, 5), *state.keys(4, 5)]
    assert under_test.tiers[0].read == [NAMESPACE + key for key in read]
    assert check_resume(under_test.stack, request, 0, 20) == 20


def test_prefetch_without_a_chain_group_reads_the_window() -> None:
    under_test = StackUnderTest(slots=200)
    request = GroupedRequest(WINDOW, chain=False)
    put_below(under_test, request, 5)
    assert prefetch(under_test, request, 20) == 2
    assert under_test.tiers[0].read == [NAMESPACE + key for key in request.needed(0, 20)]
    assert check_resume(under_test.stack, request, 0, 20) == 20


def test_prefetch_of_a_point_without_its_side_block_takes_an_earlier_one() -> None:
    under_test = StackUnderTest(slots=200)
    request = GroupedRequest(STATE)
    put_below(under_test, request, 6)
    del under_test.tiers[0].held[NAMESPACE + request.key(1, 5)]
    assert prefetch(under_test, request, 24) == 5
    assert under_test.tiers[0].read == [NAMESPACE + key for key in request.needed(0, 20)]
    assert check_resume(under_test.stack, request, 0, 24) == 20


def test_prefetch_from_two_tiers_joins_their_blocks() -> None:
    under_test = StackUnderTest(slots=200, tiers=2)
    request = GroupedRequest(STATE)
    chain, state = request.groups
    under_test.put_in_tier(chain.keys(0, 6), 1)
    under_test.put_in_tier(state.keys(0, 6), 0)
    assert prefetch(under_test, request, 24) == 6
    assert under_test.tiers[0].read == [NAMESPACE + request.key(1, 5)]
    assert check_resume(under_test.stack, request, 0, 24) == 24


def test_prefetch_with_a_failed_side_load_keeps_the_chain() -> None:
    under_test = StackUnderTest(slots=200)
    request = GroupedRequest(STATE)
    put_below(under_test, request, 4)
    under_test.tiers[0].held[NAMESPACE + request.key(1, 3)] = b"short"
    assert prefetch(under_test, request, 16) == 4
    assert check_resume(under_test.stack, request, 0, 16) == 0
    assert under_test.front.contains(request.groups[0].keys(0, 4)) == [True] * 4
    under_test.check_invariants()


@pytest.mark.parametrize("lookup", ["ask", "load"])
def test_promotion_after_l1_evicted_its_own_resume_point_finds_no_other(lookup: str) -> None:
    under_test = StackUnderTest(slots=200, lookup=lookup)
    request = GroupedRequest(STATE)
    own, top = 3 * BLOCK_TOKENS, 5 * BLOCK_TOKENS  # L1 had the first three blocks a moment ago
    lower, groups = under_test.stack.lower, request.groups
    match, tokens = promote_resume(
        lower, groups, own, top, BLOCK_TOKENS, time.monotonic, INVALID_SPAN
    )
    assert (tokens, match.sources) == (own, ())
    under_test.check_invariants()


def test_concurrent_prefetches_read_each_block_once() -> None:
    under_test = StackUnderTest(slots=200)
    request = GroupedRequest(WINDOW, STATE)
    put_below(under_test, request, 6)
    [tier] = under_test.tiers
    tier.gate.clear()
    futures = [under_test.stack.prefetch_resume(request.groups, 24, BLOCK_TOKENS) for _ in range(3)]
    assert tier.waiting.acquire(timeout=LONG)
    tier.gate.set()
    for future in futures:
        assert future is not None
        assert future.result(LONG).blocks == 6
    assert sorted(tier.read) == sorted(NAMESPACE + key for key in request.needed(0, 24))


def test_prefetch_counts_the_load_time_of_side_blocks() -> None:
    clock = ManualClock(100.0)
    tier = TimedTier(clock)
    under_test = StackUnderTest(slots=400, tiers=[tier], calls=1, clock=clock)
    [lower] = under_test.lower
    tier.load_s = 0.06
    under_test.stack.observe_compute(1, 0.1)
    under_test.stack.observe_compute(100, 10.0)
    chain = GroupedRequest(name="measured")
    under_test.put_in_tier(chain.groups[0].keys(0, 8))
    assert prefetch(under_test, chain, 32) == 8
    assert lower.claim_remeasure()  # so that no remeasurement is due
    tier.read.clear()

    def put_in_tier(request: GroupedRequest) -> None:
        for group in request.groups:
            under_test.put_in_tier(group.keys(0, 8))

    # A block takes 0.1 s to compute, and two of 0.06 s each to load.
    request = GroupedRequest(Needs("window", 400), name="long window")
    put_in_tier(request)
    assert prefetch(under_test, request, 32) == 0
    assert (tier.read, lower.stats().skipped_blocks) == ([], 16)
    request = GroupedRequest(STATE, name="state")
    put_in_tier(request)
    assert prefetch(under_test, request, 32) == 8
    # L1 has the chain: the side blocks alone are faster to load.
    request = GroupedRequest(Needs("window", 400), name="window alone")
    put_in_tier(request)
    put_branches(under_test.stack, request.branches(0, 8)[0])
    assert prefetch(under_test, request, 32) == 8
    assert check_resume(under_test.stack, request, 0, 32) == 32


@pytest.mark.parametrize(("load_s", "promoted"), [(0.04, 16), (0.06, 0)])
def test_prefetch_compares_the_parts_of_a_block_with_its_computation(
    load_s: float, promoted: int
) -> None:
    clock = ManualClock(100.0)
    tier = TimedTier(clock)
    under_test = StackUnderTest(slots=400, tiers=[tier], calls=1, clock=clock)
    tier.load_s = load_s  # of a part; a block has two, and takes 0.1 s to compute
    measured = GroupedRequest(name="measured")
    under_test.put_in_tier(measured.groups[0].keys(0, 8))
    assert prefetch(under_test, measured, 32) == 8
    assert under_test.lower[0].claim_remeasure()  # so that no remeasurement is due
    under_test.stack.observe_compute(1, 0.1)
    under_test.stack.observe_compute(100, 10.0)
    request = GroupedRequest(Needs("chunk", 32), parts=2)
    chain, chunk = request.groups
    under_test.put_in_tier([*chain.keys(0, 8), *chunk.keys(0, 8)])
    assert prefetch(under_test, request, 32) == promoted


def test_prefetch_of_a_slow_tier_stops_where_the_fast_one_ends() -> None:
    clock = ManualClock(100.0)
    tiers = [TimedTier(clock), TimedTier(clock)]
    under_test = StackUnderTest(slots=400, tiers=tiers, calls=1, clock=clock)
    tiers[0].load_s, tiers[1].load_s = 0.01, 0.5
    under_test.stack.observe_compute(1, 0.1)
    under_test.stack.observe_compute(100, 10.0)
    for number in range(2):
        measured = GroupedRequest(name=f"measured {number}")
        under_test.put_in_tier(measured.groups[0].keys(0, 4), number)
        prefetch(under_test, measured, 16)
    assert under_test.lower[1].claim_remeasure()
    request = GroupedRequest(STATE)
    chain, state = request.groups
    under_test.put_in_tier(chain.keys(0, 5), 0)
    under_test.put_in_tier(chain.keys(5, 8), 1)
    under_test.put_in_tier(state.keys(0, 8), 0)
    assert prefetch(under_test, request, 32) == 5
    assert check_resume(under_test.stack, request, 0, 32) == 20
    assert under_test.lower[1].stats().skipped_blocks == 3


def test_full_queue_writes_the_first_blocks_of_all_groups() -> None:
    under_test = StackUnderTest(slots=40)  # the queue holds 10 blocks
    request = GroupedRequest(WINDOW, STATE)
    put_branches(under_test.stack, *request.branches(0, 8))
    assert under_test.stack.flush(LONG)
    [tier] = under_test.tiers
    expected = [NAMESPACE + key for group in request.groups for key in group.keys(0, 3)]
    assert set(tier.held) == {*expected, NAMESPACE + request.key(0, 3)}
    under_test.front.clear()
    assert prefetch(under_test, request, 32) == 3
    assert check_resume(under_test.stack, request, 0, 32) == 12


def test_writes_hot_writes_the_blocks_of_a_hit_on_all_groups() -> None:
    under_test = StackUnderTest(slots=200, writes="hot")
    request = GroupedRequest(WINDOW, STATE)
    put_branches(under_test.stack, *request.branches(0, 5))
    assert check_resume(under_test.stack, request, 0, 20) == 20
    assert under_test.stack.flush(LONG)
    [tier] = under_test.tiers
    assert sorted(tier.held) == sorted(NAMESPACE + key for key in request.needed(0, 20))
    under_test.front.clear()
    assert prefetch(under_test, request, 20) == 5
    assert check_resume(under_test.stack, request, 0, 20) == 20


def test_clear_forgets_the_blocks_of_all_groups() -> None:
    under_test = StackUnderTest(slots=200)
    request = GroupedRequest(WINDOW, STATE)
    put_below(under_test, request, 5)
    under_test.stack.clear()
    assert prefetch(under_test, request, 20) == 0
    assert check_resume(under_test.stack, request, 0, 20) == 0
    under_test.check_invariants()


def test_write_behind_stores_each_side_block_with_its_parent() -> None:
    tier = BranchRecorder()
    under_test = StackUnderTest(slots=200, tiers=[tier], blocks_per_call=100)
    request = GroupedRequest(WINDOW, parts=2)
    put_branches(under_test.stack, *request.branches(0, 3))
    put_branches(under_test.stack, *request.branches(3, 5))
    assert under_test.stack.flush(LONG)
    chain, window = request.groups

    def named(first: int, end: int) -> list[Branch]:
        parent = NAMESPACE + chain.keys(first - 1, first)[-1] if first else None
        branches: list[Branch] = [([NAMESPACE + key for key in chain.keys(first, end)], parent)]
        for at in range(first, end):
            keys = [NAMESPACE + key for key in window.keys(at, at + 1)]
            branches.append((keys, NAMESPACE + chain.keys(at, at + 1)[-1]))
        return branches

    assert tier.stored == [named(0, 3), named(3, 5)]


def test_hint_soon_promotes_what_the_resume_point_needs() -> None:
    under_test = StackUnderTest(slots=200)
    request = GroupedRequest(WINDOW, STATE)
    put_below(under_test, request, 5)
    [tier] = under_test.tiers
    tier.gate.clear()
    under_test.stack.hint_resume(request.groups, 5 * BLOCK_TOKENS + 1, soon=True)
    assert tier.waiting.acquire(timeout=LONG)
    tier.gate.set()
    prefetch(under_test, request, 20)  # waits for the same reads
    assert check_resume(under_test.stack, request, 0, 20) == 20
    assert sorted(tier.read) == sorted(NAMESPACE + key for key in request.needed(0, 20))
