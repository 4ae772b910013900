"""Preemption, and an L1 smaller than the traffic: answers stay right, and the counts add up."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine import one_engine, scarce_memory
from tests.support.engine.engine import Answer
from tests.support.engine.process import Play

pytestmark = pytest.mark.engine

SETTINGS = {"budget": 256, "context": 512, "options": {"dtype": "float32"}}
NOTHING = {"promised": 0, "running": 0, "jobs": 0, "loads": 0, "pinned": 0}


@pytest.fixture(scope="module")
def short(stage: Stage) -> Play:
    """19 blocks for the engine, 40 for L1."""
    acts = (
        scarce_memory.preempted,
        scarce_memory.preempted_and_aborted,
        scarce_memory.many_chats,
        one_engine.ends,
    )
    return stage(acts, blocks=20, l1="2560KiB", **SETTINGS)


@pytest.fixture(scope="module")
def roomy(stage: Stage) -> Play:
    return stage((scarce_memory.preempted, scarce_memory.many_chats), blocks=1000, **SETTINGS)


def assert_alike(answers: list[Answer], reference: list[Answer]) -> None:
    """Equal tokens, and logprobs that differ by rounding at most."""
    assert [a["tokens"] for a in answers] == [a["tokens"] for a in reference]
    for one, other in zip(answers, reference, strict=True):
        for best, best_too in zip(one["logprobs"], other["logprobs"], strict=True):
            assert dict(best) == pytest.approx(dict(best_too), abs=1e-3)


def test_preempted_requests_resume_right(short: Play, roomy: Play) -> None:
    facts, reference = short.of(scarce_memory.preempted), roomy.of(scarce_memory.preempted)
    assert facts["preemptions"] > 0
    assert reference["preemptions"] == 0
    assert_alike(facts["answers"], reference["answers"])
    assert facts["ends"] == NOTHING


def test_next_turn_of_a_preempted_request_is_found(short: Play, roomy: Play) -> None:
    later, reference = (
        short.of(scarce_memory.preempted)["answers"][4:],
        roomy.of(scarce_memory.preempted),
    )
    assert [a["cached"] for a in later] == [a["cached"] for a in reference["answers"][4:]]


def test_preempted_request_is_aborted(short: Play) -> None:
    facts = short.of(scarce_memory.preempted_and_aborted)
    assert facts == {"left": False, "answers": 3, "ends": NOTHING}


def test_l1_smaller_than_the_traffic(short: Play, roomy: Play) -> None:
    facts = short.of(scarce_memory.many_chats)
    assert_alike(facts["answers"], roomy.of(scarce_memory.many_chats)["answers"])
    assert facts["most"] <= facts["capacity"] == 40
    assert facts["evicted_blocks"] > 40
    assert facts["stored_blocks"] - facts["evicted_blocks"] == facts["used"]
    assert facts["dropped_blocks"] == facts["failed_blocks"] == 0


def test_no_end_is_open(short: Play) -> None:
    assert short.of(one_engine.ends) == NOTHING
