"""Blocks that depend on a failed load are not published, however late vLLM reports the failure.

Steps are built as with async scheduling: one before the one before it is reported. Blocks 1 to 3
are loaded for request "a". That load fails, so what a step then computes is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks, Step, Transfer
from tests.support.played_engine import BLOCK, PlayedEngine, Request, opened

pytestmark = pytest.mark.engine

LOADED = 3


def engine(monkeypatch: pytest.MonkeyPatch, *, ahead: bool) -> PlayedEngine:
    played = opened(monkeypatch, 32, ahead=ahead)
    played.keep(Request("kept", LOADED * BLOCK + 1, "same"), [31, 32, 33, 34])
    return played


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    played = engine(monkeypatch, ahead=True)
    yield played
    played.side.close()


@pytest.fixture
def recomputing(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    played = engine(monkeypatch, ahead=False)
    yield played
    played.side.close()


def loading(played: PlayedEngine, more: int = 3) -> tuple[Request, Step]:
    """Build a step that loads the first blocks of a request and computes the one after them."""
    request = Request("a", (LOADED + more) * BLOCK, "same")
    assert played.admit(request, range(1, 1 + LOADED + more)) == LOADED * BLOCK
    return request, played.step((request, BLOCK))


def report(played: PlayedEngine, step: Step, *others: Transfer, failed: bool = True) -> None:
    """Report a step of which the load failed on one rank; `others` succeeded."""
    jobs = [*step.loads, *others]
    bad = [block for load in step.loads for block in load.blocks]
    if failed:
        played.side.fail_loads(bad)
    failures = {load.job for load in step.loads} if failed else set()
    acks = dict.fromkeys([job.job for job in jobs], 2)
    played.side.end_step(Acks(acks, failures, step.number))


def test_store_of_the_step_after_the_failed_load_is_not_published(played: PlayedEngine) -> None:
    request, step = loading(played)
    ahead = played.step((request, BLOCK))
    report(played, step, *step.stores)
    played.ack(*ahead.stores)
    assert ahead.stores
    assert played.held(request) == [False] * 6
    played.side.finish(request)
    assert played.is_idle()


@pytest.mark.parametrize("load_first", [False, True])
def test_store_acknowledged_together_with_the_failure_is_not_published(
    played: PlayedEngine, load_first: bool
) -> None:
    request, step = loading(played)
    ahead = played.step((request, BLOCK))
    jobs = [*step.loads, *step.stores, *ahead.stores]
    order = jobs if load_first else jobs[::-1]
    failed = {load.job for load in step.loads}
    played.side.end_step(Acks({job.job: 2 for job in order}, failed, step.number))
    assert played.held(request) == [False] * 6


def test_store_of_another_request_of_those_steps_is_offered_again(played: PlayedEngine) -> None:
    other = Request("other", 3 * BLOCK)
    played.admit(other, [11, 12, 13])
    request, step = loading(played)
    ahead = played.step((request, BLOCK), (other, BLOCK))
    report(played, step, *step.stores)
    played.ack(*ahead.stores)
    assert played.held(other) == [False] * 3
    after = played.step((other, BLOCK))
    played.ack(*after.stores)
    assert played.held(other) == [True, True, False]


def test_request_that_found_the_blocks_in_vllms_cache_publishes_nothing_after_them(
    played: PlayedEngine,
) -> None:
    _, step = loading(played)
    sharing = Request("b", 6 * BLOCK, "same")
    assert played.admit(sharing, [1, 2, 3, 21, 22, 23], own=LOADED * BLOCK) == 0
    ahead = played.step((sharing, BLOCK))
    report(played, step, *step.stores)
    played.ack(*ahead.stores)
    for _ in range(2):  # vLLM does not set it back
        assert played.step((sharing, BLOCK)).stores == []
    assert played.held(sharing) == [False] * 6


def test_request_that_finds_a_suspect_block_publishes_nothing_after_it(
    played: PlayedEngine,
) -> None:
    request, step = loading(played)
    report(played, step, *step.stores)
    assert played.side.take_suspects() == {1, 2, 3, 4, 5, 6}
    played.step((request, BLOCK))  # it continues at its old position
    assert {5, 6} <= played.side.take_suspects()
    finds = Request("b", 7 * BLOCK, "same")
    played.admit(finds, [21, 22, 23, 24, 5, 25, 26], own=5 * BLOCK)
    [store] = played.step((finds, BLOCK)).stores
    assert store.blocks == [21, 22, 23, 24]


def test_request_that_ended_before_the_report_makes_its_blocks_suspect(
    played: PlayedEngine,
) -> None:
    request, step = loading(played)
    played.step((request, BLOCK))
    played.side.finish(request)
    finds = Request("b", 6 * BLOCK, "same")
    report(played, step, *step.stores)
    assert played.side.take_suspects() == {1, 2, 3, 4, 5, 6}
    played.admit(finds, [21, 22, 23, 24, 5, 25], own=5 * BLOCK)
    [store] = played.step((finds, BLOCK)).stores
    assert store.blocks == [21, 22, 23, 24]


def test_suspect_block_that_another_request_computes_is_published(played: PlayedEngine) -> None:
    request, step = loading(played)
    report(played, step, *step.stores)
    played.side.finish(request)
    fresh = Request("b", 6 * BLOCK, "same")
    assert played.admit(fresh, [6, 5, 4, 3, 2, 1]) == 0
    stores = []
    for tokens in (40, 100, 52):
        after = played.step((fresh, tokens))
        stores += after.stores
        played.ack(*after.stores)
    assert played.held(fresh) == [True] * 6
    assert played.side.table_sizes()["suspect_blocks"] == 0


def test_request_recomputed_by_an_engine_that_runs_ahead_publishes_nothing(
    played: PlayedEngine,
) -> None:
    request, step = loading(played)
    report(played, step, *step.stores)
    request.num_computed_tokens = 0
    assert played.step((request, 6 * BLOCK)).stores == []
    request.num_computed_tokens = 0  # preempted: it starts again
    played.admit(request, [11, 12, 13, 14, 15, 16], resumed=True)
    assert [store.blocks for store in played.step((request, 6 * BLOCK)).stores] == [
        [11, 12, 13, 14, 15, 16]
    ]


def test_request_recomputed_by_an_engine_that_does_not_run_ahead_publishes_again(
    recomputing: PlayedEngine,
) -> None:
    played = recomputing
    request, step = loading(played)
    report(played, step, *step.stores)
    request.num_computed_tokens = 0
    stores = []
    for tokens in (40, 6 * BLOCK - 40):
        after = played.step((request, tokens))
        stores += [store.blocks for store in after.stores]
        played.ack(*after.stores)
    assert stores == [[1], [2, 3, 4, 5, 6]]
    assert played.held(request) == [True] * 6
    assert played.side.table_sizes()["suspect_blocks"] == 0


def test_ended_requests_are_forgotten_once_their_steps_are_reported(
    played: PlayedEngine,
) -> None:
    request, step = loading(played)
    ahead = played.step((request, BLOCK))
    played.side.finish(request)
    report(played, step, *step.stores, failed=False)
    assert played.side.table_sizes()["ended_requests"] == 1
    played.side.end_step(Acks({job.job: 2 for job in ahead.stores}, step=ahead.number))
    assert played.side.table_sizes()["ended_requests"] == 0
    assert played.held(request) == [True] * 5 + [False]


def test_session_with_half_a_block_from_before_a_reset_publishes_nothing(
    recomputing: PlayedEngine,
) -> None:
    """Between the parts of a session's prompt vLLM keeps its blocks and admits it again."""
    played = recomputing
    request = Request("session", 20)
    played.admit(request, [1, 2])
    played.ack(*played.step((request, 20)).stores)
    played.side.reset()
    request.num_tokens = 2 * BLOCK
    played.readmit(request)
    assert played.step((request, 2 * BLOCK - 20)).stores == []
