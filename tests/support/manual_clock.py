"""A clock that a test sets."""

import threading


class ManualClock:
    """Returns ``now`` when called. Safe to advance from several threads."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        with self._lock:
            self.now += seconds
