"""Compares the completions of two engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.engine.engine import Completion


def assert_equal(
    answers: Sequence[Completion], reference: Sequence[Completion], tolerance: float
) -> None:
    """Assert that hits cover at least those of the reference, and that completions are equal.

    To the last bit where the hits are equal. Else the engines have computed the prompt in other
    steps, and the completions must be close.
    """
    pairs = list(zip(answers, reference, strict=True))
    hits = [(answer["cached"], right["cached"]) for answer, right in pairs]
    assert all(hit >= own for hit, own in hits), hits
    for number, (answer, right) in enumerate(pairs):
        if answer["cached"] == right["cached"]:
            assert answer == right, f"completion {number}"
    assert_close(answers, reference, tolerance)


def assert_close(
    answers: Sequence[Completion], reference: Sequence[Completion], tolerance: float
) -> None:
    """Assert that logprobs differ by at most `tolerance`, up to a tie between two tokens.

    After a tie the engines may have different tokens, hence different inputs.
    """
    for number, (answer, right) in enumerate(zip(answers, reference, strict=True)):
        assert len(answer["tokens"]) == len(right["tokens"])
        for position, token in enumerate(right["tokens"]):
            found, best = (dict(each["logprobs"][position]) for each in (answer, right))
            common = found.keys() & best.keys()
            at = f"completion {number}, position {position}"
            assert {each: found[each] for each in common} == pytest.approx(
                {each: best[each] for each in common}, abs=tolerance
            ), at
            if answer["tokens"][position] != token:
                break  # a tie, or one of the best three is another: the next inputs differ


def assert_no_open_state(facts: dict[str, Any]) -> None:
    """Assert that the engine had no open state each time that the scenario has looked."""
    assert facts["ends"]
    assert not [state for state in facts["ends"] if any(state.values())]
