"""Preemption, and an L1 smaller than the traffic: completions stay equal, and counts add up."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import RunEngine
from tests.support.engine import one_engine, scarce_memory
from tests.support.engine.engine import Completion
from tests.support.engine.process import EngineRun

pytestmark = pytest.mark.engine

SETTINGS = {"budget": 256, "context": 512, "options": {"dtype": "float32"}}
NO_OPEN_STATE = {"promised": 0, "running": 0, "jobs": 0, "loads": 0, "pinned": 0}


@pytest.fixture(scope="module")
def short(run_engine: RunEngine) -> EngineRun:
    """19 blocks for the engine, 40 for L1."""
    acts = (
        scarce_memory.preemption,
        scarce_memory.abort_of_a_preempted_request,
        scarce_memory.many_chats,
        one_engine.final_state,
    )
    return run_engine(acts, blocks=20, l1="2560KiB", **SETTINGS)


@pytest.fixture(scope="module")
def roomy(run_engine: RunEngine) -> EngineRun:
    return run_engine((scarce_memory.preemption, scarce_memory.many_chats), blocks=1000, **SETTINGS)


def assert_same_tokens_and_close_logprobs(
    answers: list[Completion], reference: list[Completion]
) -> None:
    """Equal tokens, and logprobs that differ by rounding at most."""
    assert [a["tokens"] for a in answers] == [a["tokens"] for a in reference]
    for one, other in zip(answers, reference, strict=True):
        for best, best_too in zip(one["logprobs"], other["logprobs"], strict=True):
            assert dict(best) == pytest.approx(dict(best_too), abs=1e-3)


def test_preempted_requests_resume_with_equal_completions(
    short: EngineRun, roomy: EngineRun
) -> None:
    facts, reference = (
        short.result_of(scarce_memory.preemption),
        roomy.result_of(scarce_memory.preemption),
    )
    assert facts["preemptions"] > 0
    assert reference["preemptions"] == 0
    assert_same_tokens_and_close_logprobs(facts["answers"], reference["answers"])
    assert facts["ends"] == NO_OPEN_STATE


def test_next_turn_of_a_preempted_request_has_hits(short: EngineRun, roomy: EngineRun) -> None:
    later, reference = (
        short.result_of(scarce_memory.preemption)["answers"][4:],
        roomy.result_of(scarce_memory.preemption),
    )
    assert [a["cached"] for a in later] == [a["cached"] for a in reference["answers"][4:]]


def test_abort_of_a_preempted_request_leaves_no_open_state(short: EngineRun) -> None:
    facts = short.result_of(scarce_memory.abort_of_a_preempted_request)
    assert facts == {"in tables": False, "answers": 3, "ends": NO_OPEN_STATE}


def test_l1_smaller_than_the_traffic_stays_within_capacity(
    short: EngineRun, roomy: EngineRun
) -> None:
    facts = short.result_of(scarce_memory.many_chats)
    assert_same_tokens_and_close_logprobs(
        facts["answers"], roomy.result_of(scarce_memory.many_chats)["answers"]
    )
    assert facts["most"] <= facts["capacity"] == 40
    assert facts["evicted_blocks"] > 40
    assert facts["stored_blocks"] - facts["evicted_blocks"] == facts["used"]
    assert facts["dropped_blocks"] == facts["failed_blocks"] == 0


def test_all_scenarios_leave_no_open_state(short: EngineRun) -> None:
    assert short.result_of(one_engine.final_state) == NO_OPEN_STATE
