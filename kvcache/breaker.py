"""When to stop asking somebody who keeps failing, and when to try again. Pure; time is injected.

::

    CLOSED --failures in a row--> OPEN --after a pause--> one PROBE --ok--> CLOSED
                                   ^------- fails: pause doubles -------'

Always true here: while OPEN nobody asks, and after a pause exactly one does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Breaker:
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

    @property
    def open(self) -> bool:
        """Whether asking is stopped, a probe under way included."""
        return self._failures >= self._limit

    @property
    def idle(self) -> bool:
        """Whether a question would be refused now; asks nothing."""
        return self.open and (self._probing or self._clock() < self._retry_at)

    def allows(self) -> bool:
        """Whether to ask now. While open, ``True`` is the one probe: its outcome must be told."""
        with self._lock:
            if not self.open:
                return True
            if self._probing or self._clock() < self._retry_at:
                return False
            self._probing = True
            return True

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
