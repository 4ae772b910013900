"""When to stop asking somebody who keeps failing, and when to try again. Pure; time is injected.

::

    CLOSED --failures in a row--> OPEN --after a pause--> one PROBE --ok--> CLOSED
                                   ^------- fails: pause doubles -------'

Always true here: while OPEN nobody asks, and after a pause exactly one does. A probe without
a report within the longest pause has failed: a call that hangs does not keep the breaker open.

How the calls to one lower tier go: a breaker that says in log and spans when it turns.

Always true: of every call that was allowed, success or failure is told; a failure that opens the
breaker, and the success that closes it, is one line in the log and an event on the call's span.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.metrics import Timer
from kvcache.secrets import redact
from kvcache.stats import TierName


class CircuitBreaker:
    """Counts failures in a row. Safe to call from several threads.

    Args:
        clock: seconds.
        failures: in a row, after which nobody asks.
        pause_s: until the first probe; doubled after each that fails.
        longest_s: the pause never exceeds this.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        failures: int = 3,
        pause_s: float = 1.0,
        longest_s: float = 60.0,
    ) -> None:
        self._clock = clock
        self._limit = failures
        self._first_pause = pause_s
        self._longest = longest_s
        self._lock = threading.Lock()
        self._failures = 0
        self._pause = pause_s
        self._retry_at = 0.0  # while open
        self._probing = False
        self._probe_until = 0.0  # while probing

    @property
    def open(self) -> bool:
        """Whether asking is stopped, a probe under way included."""
        return self._failures >= self._limit

    @property
    def idle(self) -> bool:
        """Whether a question would be refused now; asks nothing."""
        return self.open and self._clock() < self._next_probe()

    def allows(self) -> bool:
        """Whether to ask now. While open, ``True`` is the one probe: its outcome must be told."""
        with self._lock:
            if not self.open:
                return True
            now = self._clock()
            if now < self._next_probe():
                return False
            self._probing, self._probe_until = True, now + self._longest
            return True

    def _next_probe(self) -> float:
        """When the next probe is allowed, while open and the last one has no report."""
        return self._probe_until if self._probing else self._retry_at

    def succeeded(self) -> bool:
        """The one asked has answered; give whether that closed the breaker."""
        with self._lock:
            closed = self.open
            self._failures, self._pause, self._probing = 0, self._first_pause, False
            return closed

    def failed(self) -> bool:
        """The one asked has not answered; give whether that opened the breaker."""
        with self._lock:
            was_open, self._failures = self.open, self._failures + 1
            if not self.open:
                return False
            if was_open and self._probing:
                self._pause = min(2 * self._pause, self._longest)
            self._retry_at = self._clock() + self._pause
            self._probing = False
            return not was_open


log = logging.getLogger(__name__)


class Health:
    """Whether to ask a tier, and what came of it. Safe to call from several threads.

    Args:
        named: the tier.
        whose: the attributes that say which tier an event is about.
        clock: seconds.
    """

    def __init__(
        self, named: TierName, whose: Mapping[str, str], clock: Callable[[], float]
    ) -> None:
        self._name = named.name
        self._whose = whose
        self._lock = threading.Lock()
        self.breaker = CircuitBreaker(clock)
        self.timer = Timer(named)
        self.errors = 0  # calls that failed or came late

    def succeeded(self, span: Span) -> None:
        """A call to the tier ended well."""
        if self.breaker.succeeded():
            log.warning("kvcache: tier %s answers again", self._name)
            span.add_event(telemetry.BREAKER_CLOSED, self._whose)

    def failed(self, verb: str, error: str, why: str, span: Span) -> None:
        """A call to the tier failed or came late: ``error`` in a word, and ``why``."""
        why = redact(why)  # a tier may be a third-party class, and may repeat what a server said
        with self._lock:
            self.errors += 1
        if span.is_recording():
            event = {**self._whose, telemetry.ERROR: error, telemetry.MESSAGE: why}
            span.add_event(telemetry.TIER_FAILED, event)
        said = f"kvcache: tier {self._name}: {verb} failed ({error}: {why})"
        if self.breaker.failed():
            log.warning("%s; it is not asked for a while", said)
            span.add_event(telemetry.BREAKER_OPENED, self._whose)
        else:
            log.debug("%s", said)
