"""Blocks that the write queue of a tier has no room for: logged once, counted always."""

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
        (Size(1 << 30), 4, "L1's capacity (it holds 1/4 of L1)"),
        (Size(3 * PAGE), 3, "the tier's queue"),
    ],
)
def test_queue_that_is_full_is_logged_once_with_the_count_and_the_option_to_raise(
    caplog: pytest.LogCaptureFixture, queue: Size, holds: int, option: str
) -> None:
    below = StackUnderTest(slots=16, queue=queue)
    below.tiers[0].gate.clear()
    below.put(keys_of("a", 10))
    [said] = warnings(caplog)
    assert said.startswith(f"kvcache: tier l2: write queue full (it holds {holds} blocks); ")
    assert f"; {10 - holds} of 10 blocks stored at once are not written" in said
    assert f"Raise {option}," in said
    below.put(keys_of("b", 2))
    assert warnings(caplog) == [said]
    assert below.stack.stats().lower[0].dropped_blocks == 10 - holds + 2
    below.tiers[0].gate.set()
    assert below.stack.flush(LONG)
    below.check_invariants()
    below.stack.close()


def test_each_tier_with_a_full_queue_logs_its_own_drops(caplog: pytest.LogCaptureFixture) -> None:
    below = StackUnderTest(slots=16, tiers=2)
    for tier in below.tiers:
        tier.gate.clear()
    below.put(keys_of("a", 6))
    assert [said.split(":")[1] for said in warnings(caplog)] == [" tier l2", " tier l3"]
    for tier in below.tiers:
        tier.gate.set()
    below.stack.close()


def test_blocks_that_an_open_breaker_drops_are_no_full_queue(
    caplog: pytest.LogCaptureFixture,
) -> None:
    below = StackUnderTest(slots=16)
    below.tiers[0].fault = "raise"
    for name in range(3):
        below.put(keys_of(f"{name}", 1))
        assert below.stack.flush(LONG)
    below.put(keys_of("a", 10))
    assert below.stack.stats().lower[0].dropped_blocks >= 10
    assert not any("write queue full" in said for said in warnings(caplog))
    below.stack.close()


def test_stores_that_fit_the_queue_and_wait_for_it_are_all_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    below = StackUnderTest(slots=16)
    for name in range(4):
        below.put(keys_of(f"{name}", 4))
        assert below.stack.flush(LONG)
    assert below.stack.stats().lower[0].stored_blocks == 16
    assert warnings(caplog) == []
    below.stack.close()
