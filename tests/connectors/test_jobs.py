"""Jobs, suspect blocks and step times, as a connector of any engine uses them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcache import Stack
from kvcache.connectors.jobs import AdmittedRequest, BlockCopies, Job, Jobs
from kvcache.connectors.step_timer import StepTimer
from kvcache.connectors.suspects import SuspectBlocks
from kvcache.testing import keys_of
from tests.support.stack_under_test import StackUnderTest

KEYS = keys_of("a", 4)
RANKS = 2
BLOCK = 32  # tokens


@pytest.fixture
def stack() -> Iterator[Stack]:
    with StackUnderTest(slots=8, tiers=0).stack as stack:
        yield stack


@pytest.fixture
def jobs() -> Jobs[str]:
    return Jobs(RANKS)


def admitted(*blocks: int) -> AdmittedRequest[str]:
    return AdmittedRequest("request", [[*blocks]])


def start_store(
    stack: Stack, jobs: Jobs[str], request: AdmittedRequest[str], complete: int = 4
) -> Job[str]:
    offered = request.unoffered(complete, BLOCK)
    lease = stack.reserve(KEYS[offered.start : offered.stop])
    request.offered[0] = offered.stop
    blocks = [request.tables[0][offered[at]] for at in lease.positions]
    copies = BlockCopies.of_one_kind(blocks, lease.slots)
    job = jobs.start("store", request, lease, copies, firsts=[offered.start])
    assert job is not None
    return job


def start_load(
    stack: Stack, jobs: Jobs[str], request: AdmittedRequest[str], first: int = 0, count: int = 4
) -> Job[str]:
    lease = stack.fetch_local(KEYS)
    blocks = request.tables[0][first : first + count][: len(lease)]
    copies = BlockCopies.of_one_kind(blocks, lease.slots[: len(blocks)])
    job = jobs.start("load", request, lease, copies, firsts=[first])
    assert job is not None
    return job


def held(stack: Stack) -> list[bool]:
    return stack.front.contains(KEYS)


def test_jobs_store_acknowledged_by_every_rank_is_published(stack: Stack, jobs: Jobs[str]) -> None:
    job = start_store(stack, jobs, admitted(5, 6, 7, 8))
    assert (job.operation, job.copies.blocks, len(set(job.copies.slots))) == (
        "store",
        [5, 6, 7, 8],
        4,
    )
    assert jobs.acknowledge({job.number: 1}, seconds={job.number: 0.5}) == []
    assert held(stack) == [False] * 4
    assert jobs.acknowledge({job.number: 1}, seconds={job.number: 0.25}) == [job]
    assert held(stack) == [True] * 4
    assert job.seconds == 0.5
    assert len(jobs) == 0


def test_jobs_store_of_blocks_with_holes_has_the_blocks_of_its_slots(
    stack: Stack, jobs: Jobs[str]
) -> None:
    stack.reserve(KEYS[:1]).end()
    assert start_store(stack, jobs, admitted(5, 6, 7, 8)).copies.blocks == [6, 7, 8]


def test_jobs_store_that_a_rank_fails_is_offered_again(stack: Stack, jobs: Jobs[str]) -> None:
    request = admitted(5, 6, 7, 8)
    first = start_store(stack, jobs, request, complete=2)
    second = start_store(stack, jobs, request)
    assert (first.copies.blocks, second.copies.blocks) == ([5, 6], [7, 8])
    jobs.acknowledge({second.number: 2})
    assert jobs.acknowledge({first.number: 2}, failed={first.number}) == [first]
    assert request.unoffered(4, BLOCK) == range(4)
    assert held(stack) == [False, False, True, True]


def test_jobs_failed_load_drops_its_blocks_and_fails_stores_under_way(
    stack: Stack, jobs: Jobs[str]
) -> None:
    stack.reserve(KEYS[:2]).end()
    request = admitted(5, 6, 7, 8)
    load = start_load(stack, jobs, request)
    store = start_store(stack, jobs, request)
    acks = {store.number: 2, load.number: 2}
    assert jobs.acknowledge(acks, failed={load.number}) == [store, load]
    assert held(stack) == [False] * 4
    assert stack.stats().pinned_slots == 0


@pytest.mark.parametrize("operation", ["load", "store"])
def test_jobs_lease_without_blocks_ends_at_once(
    stack: Stack, jobs: Jobs[str], operation: str
) -> None:
    nothing = BlockCopies([], [], [])
    if operation == "load":
        stack.reserve(KEYS).end()
        assert jobs.start("load", admitted(5, 6), stack.fetch_local(KEYS), nothing) is None
    else:
        assert jobs.start("store", admitted(5, 6), stack.reserve([]), nothing) is None
    assert stack.stats().pinned_slots == len(jobs) == 0


def test_jobs_load_of_fewer_blocks_than_pinned_releases_all_with_its_acks(
    stack: Stack, jobs: Jobs[str]
) -> None:
    stack.reserve(KEYS).end()
    job = start_load(stack, jobs, admitted(5, 6, 7, 8), first=1, count=2)
    assert (job.copies.blocks, len(job.copies.slots)) == ([6, 7], 2)
    jobs.acknowledge({job.number: 2})
    assert stack.stats().pinned_slots == 0


def test_admitted_request_offers_nothing_from_its_first_suspect_block_on() -> None:
    request = admitted(5, 6, 7, 8)
    request.first_suspect = 2 * BLOCK + 5
    assert request.unoffered(4, BLOCK) == range(2)
    request.offered = [3]
    assert not request.unoffered(4, BLOCK)


def test_suspects_of_a_failed_load_spread_to_requests_that_share_its_blocks() -> None:
    suspects = SuspectBlocks([BLOCK], recomputes=True)
    shares, apart = admitted(5, 6, 7), admitted(8, 9)
    ended = admitted(7, 10)
    suspects.request_ended(ended, step=3)
    suspects.load_failed({6}, [shares, apart])
    assert (shares.first_suspect, apart.first_suspect, ended.first_suspect) == (BLOCK, None, 0)
    assert suspects.take() == {6, 7, 10}
    assert suspects.take() == set()
    suspects.step_reported(3)
    assert suspects.unreported == 0
    suspects.load_started([6, 7, 10])
    assert len(suspects) == 0


def test_suspects_in_one_group_make_a_request_suspect_in_all_from_the_same_token_on() -> None:
    suspects = SuspectBlocks([BLOCK, 2 * BLOCK], recomputes=False, no_block=0)
    windows = AdmittedRequest("request", [[5, 6, 7, 8], [0, 9]], [0, 0])
    other = AdmittedRequest("other", [[10, 11], [9]], [0, 0])
    suspects.load_failed({9}, [windows, other])
    assert (windows.first_suspect, other.first_suspect) == (2 * BLOCK, 0)
    assert suspects.take() == {7, 8, 9, 10, 11}
    assert windows.unoffered(2, 2 * BLOCK, 1) == range(1)


def test_jobs_failed_store_is_offered_again_in_every_group(stack: Stack, jobs: Jobs[str]) -> None:
    request = AdmittedRequest("request", [[5, 6], [7, 8]], [2, 1])
    lease = stack.reserve(KEYS[:2])
    copies = BlockCopies([5, 7], list(lease.slots), [(0, 1), (1, 1)])
    job = jobs.start("store", request, lease, copies, firsts=[1, 0])
    assert job is not None
    jobs.acknowledge({job.number: RANKS}, failed={job.number})
    assert request.offered == [1, 0]


def test_step_timer_overlapping_steps_are_timed_from_the_end_before() -> None:
    now = 0.0
    timer = StepTimer(32, lambda: now)
    timer.built(1, [(0, 64)])
    now = 1.0
    timer.built(2, [(64, 32), (0, 32)])
    now = 3.0
    assert timer.ended(1) == (2.0, 3.0, 1.0)
    now = 4.0
    assert timer.ended(2) == (2.0, 1.0, (2.5 + 0.5) / 2)
    assert timer.ended(2) is None
    assert len(timer) == 0


def test_step_timer_forgets_steps_before_the_one_that_ended() -> None:
    timer = StepTimer(32, lambda: 0.0)
    timer.built(1, [])
    timer.built(2, [])
    assert timer.ended(2) == (0.0, 0.0, 0.0)
    assert len(timer) == 0
