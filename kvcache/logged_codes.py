"""The error codes of a server that a tier has logged."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Final

MAX_LOGGED_CODES: Final = 16
"""A hostile server can invent any number of codes."""


class LoggedCodes:
    """Lets a tier log each error code once. Safe to call from several threads."""

    def __init__(self) -> None:
        self._codes: set[Hashable] = set()
        self._lock = threading.Lock()

    def add(self, code: Hashable) -> bool:
        """Return whether to log ``code`` now; never more than ``MAX_LOGGED_CODES`` codes."""
        with self._lock:
            if code in self._codes or len(self._codes) == MAX_LOGGED_CODES:
                return False
            self._codes.add(code)
            return True
