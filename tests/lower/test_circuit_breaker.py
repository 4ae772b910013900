"""When somebody who keeps failing is asked, by an injected clock."""

import pytest

from kvcache.lower.circuit_breaker import CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(breaker: CircuitBreaker, times: int) -> list[bool]:
    return [breaker.record_failure() for _ in range(times)]


def test_it_opens_after_failures_in_a_row(clock: Clock) -> None:
    breaker = CircuitBreaker(clock, failures=3)
    assert fail(breaker, 2) == [False, False]
    assert not breaker.record_success()
    assert fail(breaker, 2) == [False, False]
    assert breaker.allow_call()
    assert fail(breaker, 1) == [True]
    assert breaker.open
    assert breaker.refusing
    assert not breaker.allow_call()


def test_after_a_pause_one_asks(clock: Clock) -> None:
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


def test_each_probe_that_fails_doubles_the_pause_up_to_the_longest(clock: Clock) -> None:
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
    assert breaker.allow_call()  # what was is forgotten


def test_late_failures_of_before_do_not_hurry_it(clock: Clock) -> None:
    breaker = CircuitBreaker(clock, failures=1, pause_s=2.0)
    breaker.record_failure()
    clock.now = 1.5
    breaker.record_failure()
    clock.now = 2.0
    assert not breaker.allow_call()


def test_a_probe_that_nothing_is_told_of_gives_way_to_another(clock: Clock) -> None:
    breaker = CircuitBreaker(clock, failures=1, pause_s=1.0, max_pause_s=8.0)
    breaker.record_failure()
    clock.now = 1.0
    assert breaker.allow_call()  # and its call hangs for ever
    clock.now = 8.9
    assert breaker.refusing
    assert not breaker.allow_call()
    clock.now = 9.0
    assert not breaker.refusing
    assert [breaker.allow_call(), breaker.allow_call()] == [True, False]
    assert breaker.record_success()
    assert not breaker.open
