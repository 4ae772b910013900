"""How the calls to one lower tier go: a breaker that says in log and spans when it turns.

Always true: of every call that was allowed, success or failure is told; a failure that opens the
breaker, and the success that closes it, is one line in the log and an event on the call's span.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.breaker import Breaker
from kvcache.metrics import Timer
from kvcache.secrets import redact
from kvcache.stats import TierName

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
        self.breaker = Breaker(clock)
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
