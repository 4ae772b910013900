"""A progress bar on a terminal. On any other stream it writes nothing."""

from __future__ import annotations

import time
from typing import TextIO

from kvcache.closeable import Closeable

_WIDTH = 30  # characters
_REDRAW_S = 0.1  # between two drawings: a terminal may be slow


class ProgressBar(Closeable):
    """Draws the share of the work that is done; ``close`` erases it.

    Args:
        stream: a terminal, or a stream that gets nothing.
        total: amount of work.
    """

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream = stream
        self._shown = stream.isatty()
        self._total = max(1, total)
        self._done = 0
        self._start_s = time.monotonic()
        self._drawn_s = 0.0  # when the bar was drawn last; 0 if it never was

    def add(self, done: int) -> None:
        """Count ``done`` more of the total as done."""
        self._done += done
        now = time.monotonic()
        if self._shown and now - self._drawn_s >= _REDRAW_S:
            self._drawn_s = now
            share = min(1.0, self._done / self._total)
            bar = ("#" * int(share * _WIDTH)).ljust(_WIDTH, ".")
            self._stream.write(f"\r{bar} {share:4.0%} {now - self._start_s:4.0f} s")
            self._stream.flush()

    def close(self) -> None:
        """Erase the bar."""
        if self._drawn_s:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
