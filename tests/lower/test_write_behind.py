"""A full write queue is logged once per tier; its dropped blocks are always counted."""

from __future__ import annotations

import logging

import pytest

from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from tests.support.stack_under_test import LONG, StackUnderTest


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("queue", "holds", "option"),
    [
        (Size(1 << 30), 4, "L1's capacity (the queue holds 1/4)"),
        (Size(3 * PAGE), 3, "the tier's queue"),
    ],
)
def test_full_queue_is_logged_once_with_the_option_to_raise(
    caplog: pytest.LogCaptureFixture, queue: Size, holds: int, option: str
) -> None:
    under_test = StackUnderTest(slots=16, queue=queue)
    under_test.tiers[0].gate.clear()
    under_test.put(keys_of("a", 10))
    [warning] = warnings(caplog)
    assert warning.startswith(f"kvcache: tier l2: write queue full (it holds {holds} blocks); ")
    assert f"; {10 - holds} of 10 blocks stored at once are not written" in warning
    assert f"Raise {option}," in warning
    under_test.put(keys_of("b", 2))
    assert warnings(caplog) == [warning]
    assert under_test.stack.stats().lower[0].dropped_blocks == 10 - holds + 2
    under_test.tiers[0].gate.set()
    assert under_test.stack.flush(LONG)
    under_test.check_invariants()
    under_test.stack.close()


def test_full_queues_of_two_tiers_are_logged_for_each(caplog: pytest.LogCaptureFixture) -> None:
    under_test = StackUnderTest(slots=16, tiers=2)
    for tier in under_test.tiers:
        tier.gate.clear()
    under_test.put(keys_of("a", 6))
    assert [warning.split(":")[1] for warning in warnings(caplog)] == [" tier l2", " tier l3"]
    for tier in under_test.tiers:
        tier.gate.set()
    under_test.stack.close()


def test_open_breaker_drops_blocks_without_a_full_queue_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    under_test = StackUnderTest(slots=16)
    under_test.tiers[0].fault = "raise"
    for name in range(3):
        under_test.put(keys_of(f"{name}", 1))
        assert under_test.stack.flush(LONG)
    under_test.put(keys_of("a", 10))
    assert under_test.stack.stats().lower[0].dropped_blocks >= 10
    assert not any("write queue full" in warning for warning in warnings(caplog))
    under_test.stack.close()


def test_stores_that_fit_the_queue_are_all_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    under_test = StackUnderTest(slots=16)
    for name in range(4):
        under_test.put(keys_of(f"{name}", 4))
        assert under_test.stack.flush(LONG)
    assert under_test.stack.stats().lower[0].stored_blocks == 16
    assert warnings(caplog) == []
    under_test.stack.close()
