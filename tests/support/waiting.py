"""Waiting for an effect of another process or thread that sends no signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PATIENCE_S: Final = 60.0
"""Bounds the wait of broken code; not a measurement."""


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition()`` is true; fail after ``PATIENCE_S`` seconds.

    Args:
        condition: is called again after pauses of 1 to 50 ms, which grow.
        what: the condition in words, for the failure.
    """
    until, pause_s = time.monotonic() + PATIENCE_S, 0.001
    while not condition():
        assert time.monotonic() < until, f"timed out: {what}"
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.05)
