"""A progress bar for a terminal; nothing anywhere else."""

from __future__ import annotations

import time
from typing import TextIO

from kvcache.closeable import Closeable

WIDTH = 30
EVERY_S = 0.1


class Bar(Closeable):
    """A context manager; what is done is told by :meth:`add`, and the bar goes when it ends."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream = stream
        self._shown = stream.isatty()
        self._total = max(1, total)
        self._done = 0
        self._begun = time.monotonic()
        self._drawn = 0.0

    def add(self, done: int) -> None:
        """So much more of the total is done."""
        self._done += done
        now = time.monotonic()
        if self._shown and now - self._drawn >= EVERY_S:
            self._drawn = now
            share = min(1.0, self._done / self._total)
            bar = ("#" * int(share * WIDTH)).ljust(WIDTH, ".")
            self._stream.write(f"\r{bar} {share:4.0%} {now - self._begun:4.0f} s")
            self._stream.flush()

    def close(self) -> None:
        """Erase the bar."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
