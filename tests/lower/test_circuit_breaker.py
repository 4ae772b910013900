"""The states of the circuit breaker, on a manual clock."""

import pytest

from kvcache.lower.circuit_breaker import CircuitBreaker
from tests.support.manual_clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def fail(breaker: CircuitBreaker, times: int) -> list[bool]:
    return [breaker.record_failure() for _ in range(times)]


def test_breaker_opens_after_failures_in_a_row(clock: ManualClock) -> None:
    breaker = CircuitBreaker(clock, failures=3)
    assert fail(breaker, 2) == [False, False]
    assert not breaker.record_success()
    assert fail(breaker, 2) == [False, False]
    assert breaker.allow_call()
    assert fail(breaker, 1) == [True]
    assert breaker.open
    assert breaker.refusing
    assert not breaker.allow_call()


def test_breaker_after_the_pause_allows_one_probe(clock: ManualClock) -> None:
    breaker = CircuitBreaker(clock, failures=1, pause_s=2.0)
    breaker.record_failure()
    clock.now = 1.9
    assert not breaker.allow_call()
    clock.now = 2.0
    assert not breaker.refusing
    assert [breaker.allow_call(), breaker.allow_call()] == [True, False]
    assert breaker.refusing
    assert breaker.record_success()
    assert not breaker.open
    assert [breaker.allow_call(), breaker.allow_call()] == [True, True]


def test_breaker_failed_probes_double_the_pause_up_to_its_maximum(clock: ManualClock) -> None:
    breaker = CircuitBreaker(clock, failures=1, pause_s=1.0, max_pause_s=3.0)
    breaker.record_failure()
    pauses = []
    for _ in range(4):
        begun = clock.now
        while not breaker.allow_call():
            clock.now += 0.5
        pauses.append(clock.now - begun)
        assert not breaker.record_failure()  # it was open already
    assert pauses == [1.0, 2.0, 3.0, 3.0]
    clock.now += 3.0
    assert breaker.allow_call()
    breaker.record_success()
    assert breaker.record_failure()
    clock.now += 1.0
    assert breaker.allow_call()  # the pause is the first one again


def test_breaker_late_failures_while_open_do_not_shorten_the_pause(clock: ManualClock) -> None:
    breaker = CircuitBreaker(clock, failures=1, pause_s=2.0)
    breaker.record_failure()
    clock.now = 1.5
    breaker.record_failure()
    clock.now = 2.0
    assert not breaker.allow_call()


def test_breaker_probe_without_an_outcome_is_replaced_by_another(clock: ManualClock) -> None:
    breaker = CircuitBreaker(clock, failures=1, pause_s=1.0, max_pause_s=8.0)
    breaker.record_failure()
    clock.now = 1.0
    assert breaker.allow_call()  # the probe hangs for ever
    clock.now = 8.9
    assert breaker.refusing
    assert not breaker.allow_call()
    clock.now = 9.0
    assert not breaker.refusing
    assert [breaker.allow_call(), breaker.allow_call()] == [True, False]
    assert breaker.record_success()
    assert not breaker.open
