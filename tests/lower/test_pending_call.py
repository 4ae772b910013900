"""A call that its caller gives up: whether the tier has failed, or was busy with other calls."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from opentelemetry.trace import INVALID_SPAN

from kvcache.lower.circuit_breaker import CircuitBreaker, TierHealth
from kvcache.lower.pending_call import PendingCall
from kvcache.stats import TierName
from tests.support.stack_under_test import LONG

AT_ONCE = 1e-9  # a deadline in seconds that has passed when a call begins


@pytest.fixture
def health() -> TierHealth:
    return TierHealth(TierName("t", "test"), {}, CircuitBreaker(lambda: 0.0))


def call_of(health: TierHealth, deadline_s: float) -> PendingCall[bool]:
    return PendingCall(health, deadline_s, "load", 1, lambda: None, INVALID_SPAN)


def test_queued_call_past_its_deadline_is_a_failure(health: TierHealth) -> None:
    health.record_success(INVALID_SPAN)
    call = call_of(health, LONG)
    assert call.wait(0.0) is None
    assert (call.error, health.errors) == ("timeout", 1)


def test_queued_call_of_a_tier_that_answers_others_is_no_failure(health: TierHealth) -> None:
    call = call_of(health, LONG)
    health.record_success(INVALID_SPAN)
    assert call.wait(0.0) is None
    assert call.future.cancelled()
    assert (call.error, health.errors) == ("busy", 0)


@pytest.mark.parametrize(
    ("deadline_s", "error", "errors"),
    [(LONG, "timeout", 1), (AT_ONCE, "busy", 0)],
    ids=["most of its time in the tier", "most of its time in the queue"],
)
def test_running_call_past_its_deadline_fails_unless_it_was_queued_long(
    health: TierHealth, deadline_s: float, error: str, errors: int
) -> None:
    begun, end = threading.Event(), threading.Event()

    def hang() -> Sequence[bool]:
        begun.set()
        end.wait(LONG)
        raise ValueError("the memory was revoked")

    call = call_of(health, deadline_s)
    health.record_success(INVALID_SPAN)
    thread = threading.Thread(target=call.run, args=[hang])
    thread.start()
    assert begun.wait(LONG)
    assert call.wait(0.0) is None
    end.set()
    thread.join(LONG)
    assert (call.error, health.errors) == (error, errors)
