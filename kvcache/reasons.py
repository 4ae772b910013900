"""Counts by reason, such as the blocks that a tier declined.

Invariant: a counter has at most ``MAX_REASONS`` reasons and ``OTHER``, because a hostile server can
invent any number of them.
"""

from __future__ import annotations

import threading
from typing import Final

MAX_REASONS: Final = 16

OTHER: Final = "other"
"""Counts the reasons after the first ``MAX_REASONS``."""


class ReasonCounter:
    """Counts by reason. Threads can share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, reason: str, count: int = 1) -> bool:
        """Add to a reason.

        Returns:
            whether the reason is new, so that the caller logs it; ``False`` for ``OTHER``.
        """
        with self._lock:
            is_new = reason not in self._counts
            if is_new and len(self._counts) >= MAX_REASONS:
                reason, is_new = OTHER, False
            self._counts[reason] = self._counts.get(reason, 0) + count
            return is_new

    def counts(self) -> dict[str, int]:
        """Return the counts at this moment."""
        with self._lock:
            return dict(self._counts)
