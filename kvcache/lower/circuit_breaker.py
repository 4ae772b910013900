"""The circuit breaker of a lower tier: when the stack stops calling it, and when it tries again.

::

    CLOSED --failures in a row--> OPEN --pause is over--> one PROBE --success--> CLOSED
                                   ^----- failure: the pause doubles -----'

Invariants:

* While the breaker is open, no call is allowed except one probe after each pause.
* If a probe reports nothing within the longest pause, another probe is allowed. A call that hangs
  does not keep the breaker open.
* The outcome of every allowed call is recorded, except of one that its caller gave up while the
  tier was busy. The failure that opens the breaker and the success that closes it are one log line
  each, and an event on the call's span.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.metrics import Timer
from kvcache.secrets import redact
from kvcache.stats import TierName

log = logging.getLogger(__name__)


class CircuitBreaker:
    """The state of the breaker, without I/O. Safe to call from several threads.

    Args:
        clock: the current time in seconds.
        failures: how many failures in a row open the breaker.
        pause_s: from opening to the first probe. Each failed probe doubles it.
        max_pause_s: the longest pause.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        failures: int = 3,
        pause_s: float = 1.0,
        max_pause_s: float = 60.0,
    ) -> None:
        self._clock = clock
        self._limit = failures
        self._first_pause_s = pause_s
        self._max_pause_s = max_pause_s
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._pause_s = pause_s
        self._retry_at = 0.0  # when the pause ends; valid while open
        self._probing = False
        self._probe_until = 0.0  # when another probe is allowed; valid while probing

    @property
    def open(self) -> bool:
        """Whether the breaker is open, also while a probe is under way."""
        return self._failures >= self._limit

    @property
    def refusing(self) -> bool:
        """Whether :meth:`allow_call` would refuse now. Does not use up the probe."""
        return self.open and self._clock() < self._next_probe_at()

    def allow_call(self) -> bool:
        """Return whether to make a call now; the caller must then record its outcome.

        While the breaker is open, ``True`` makes this call the probe.
        """
        with self._lock:
            if not self.open:
                return True
            now = self._clock()
            if now < self._next_probe_at():
                return False
            self._probing, self._probe_until = True, now + self._max_pause_s
            return True

    def _next_probe_at(self) -> float:
        return self._probe_until if self._probing else self._retry_at

    def record_success(self) -> bool:
        """Record that a call succeeded; return whether that closed the breaker."""
        with self._lock:
            closed = self.open
            self._failures, self._pause_s, self._probing = 0, self._first_pause_s, False
            return closed

    def record_failure(self) -> bool:
        """Record that a call failed; return whether that opened the breaker."""
        with self._lock:
            was_open, self._failures = self.open, self._failures + 1
            if not self.open:
                return False
            if was_open and self._probing:
                self._pause_s = min(2 * self._pause_s, self._max_pause_s)
            self._retry_at = self._clock() + self._pause_s
            self._probing = False
            return not was_open


class TierHealth:
    """Owns the circuit breaker, the timer and the error count of one lower tier.

    It logs and traces the outcome of each call. Safe to call from several threads.

    Args:
        tier_name: the tier's name and kind in its profile.
        tier_attributes: the span attributes that identify the tier.
        breaker: the tier's circuit breaker.
    """

    def __init__(
        self, tier_name: TierName, tier_attributes: Mapping[str, str], breaker: CircuitBreaker
    ) -> None:
        self._name = tier_name.name
        self._tier_attributes = tier_attributes
        self._lock = threading.Lock()
        self.breaker = breaker
        self.timer = Timer(tier_name)
        self.errors = 0  # calls that failed or missed their deadline
        self.succeeded_at = 0.0  # when a call last succeeded, by ``time.monotonic``

    def record_success(self, span: Span) -> None:
        """Record that a call to the tier succeeded; ``span`` is the call's span."""
        self.succeeded_at = time.monotonic()
        if self.breaker.record_success():
            log.warning("kvcache: tier %s: circuit breaker closed; calls resume", self._name)
            span.add_event(telemetry.BREAKER_CLOSED, self._tier_attributes)

    def record_failure(self, operation: str, error: str, why: str, span: Span) -> None:
        """Record that a call failed or missed its deadline.

        Args:
            operation: the tier's method.
            error: the kind of failure in one word.
            why: the text of the failure; secrets in it are redacted.
            span: the call's span.
        """
        why = redact(why)  # a third-party tier may repeat what a server sent
        with self._lock:
            self.errors += 1
        if span.is_recording():
            event = {**self._tier_attributes, telemetry.ERROR: error, telemetry.MESSAGE: why}
            span.add_event(telemetry.TIER_FAILED, event)
        if self.breaker.record_failure():
            log.warning(
                "kvcache: tier %s: circuit breaker opened (%s failed: %s: %s); calls pause",
                self._name, operation, error, why,
            )  # fmt: skip
            span.add_event(telemetry.BREAKER_OPENED, self._tier_attributes)
        else:
            log.debug("kvcache: tier %s: %s failed (%s: %s)", self._name, operation, error, why)
