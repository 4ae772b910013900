"""Jobs, suspect blocks and step times, as a connector of any engine uses them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcache import Stack
from kvcache.connectors.jobs import AdmittedRequest, Job, Jobs
from kvcache.connectors.step_timer import StepTimer
from kvcache.connectors.suspects import SuspectBlocks
from kvcache.testing import keys_of
from tests.support.stack_under_test import StackUnderTest

KEYS = keys_of("a", 4)
RANKS = 2


@pytest.fixture
def stack() -> Iterator[Stack]:
    with StackUnderTest(slots=8, tiers=0).stack as stack:
        yield stack


@pytest.fixture
def jobs() -> Jobs[str]:
    return Jobs(RANKS)


def admitted(*blocks: int) -> AdmittedRequest[str]:
    return AdmittedRequest("request", [*blocks])


def start_store(
    stack: Stack, jobs: Jobs[str], request: AdmittedRequest[str], complete: int = 4
) -> Job[str]:
    offered = request.unoffered(complete)
    keys = KEYS[offered.start : offered.stop]
    job = jobs.start_store(request, stack.reserve(keys), offered)
    assert job is not None
    return job


def start_load(stack: Stack, jobs: Jobs[str], request: AdmittedRequest[str]) -> Job[str]:
    lease = stack.fetch_local(KEYS)
    job = jobs.start_load(request, lease, 0, len(lease))
    assert job is not None
    return job


def held(stack: Stack) -> list[bool]:
    return stack.front.contains(KEYS)


def test_jobs_store_acknowledged_by_every_rank_is_published(stack: Stack, jobs: Jobs[str]) -> None:
    job = start_store(stack, jobs, admitted(5, 6, 7, 8))
    assert (job.operation, job.blocks, len(set(job.slots))) == ("store", [5, 6, 7, 8], 4)
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
    assert start_store(stack, jobs, admitted(5, 6, 7, 8)).blocks == [6, 7, 8]


def test_jobs_store_that_a_rank_fails_is_offered_again(stack: Stack, jobs: Jobs[str]) -> None:
    request = admitted(5, 6, 7, 8)
    first = start_store(stack, jobs, request, complete=2)
    second = start_store(stack, jobs, request)
    assert (first.blocks, second.blocks, request.offered) == ([5, 6], [7, 8], 4)
    jobs.acknowledge({second.number: 2})
    assert jobs.acknowledge({first.number: 2}, failed={first.number}) == [first]
    assert request.unoffered(4) == range(4)
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
    request = admitted(5, 6, 7, 8)
    if operation == "load":
        stack.reserve(KEYS).end()
        assert jobs.start_load(request, stack.fetch_local(KEYS), 0, 0) is None
    else:
        assert jobs.start_store(request, stack.reserve([]), range(4)) is None
        assert request.offered == 4
    assert stack.stats().pinned_slots == len(jobs) == 0


def test_jobs_load_of_fewer_blocks_than_pinned_releases_all_with_its_acks(
    stack: Stack, jobs: Jobs[str]
) -> None:
    stack.reserve(KEYS).end()
    job = jobs.start_load(admitted(5, 6, 7, 8), stack.fetch_local(KEYS), 1, 2)
    assert job is not None
    assert (job.blocks, len(job.slots)) == ([6, 7], 2)
    jobs.acknowledge({job.number: 2})
    assert stack.stats().pinned_slots == 0


def test_admitted_request_offers_nothing_from_its_first_suspect_block_on() -> None:
    request = admitted(5, 6, 7, 8)
    request.first_suspect = 2
    assert request.unoffered(4) == range(2)
    request.offered = 3
    assert not request.unoffered(4)


def test_suspects_of_a_failed_load_spread_to_requests_that_share_its_blocks() -> None:
    suspects = SuspectBlocks(32, recomputes=True)
    shares, apart = admitted(5, 6, 7), admitted(8, 9)
    ended = admitted(7, 10)
    suspects.request_ended(ended, step=3)
    suspects.load_failed({6}, [shares, apart])
    assert (shares.first_suspect, apart.first_suspect, ended.first_suspect) == (1, None, 0)
    assert suspects.take() == {6, 7, 10}
    assert suspects.take() == set()
    suspects.step_reported(3)
    assert suspects.unreported == 0
    suspects.load_started([6, 7, 10])
    assert len(suspects) == 0


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
