"""How the doctor measures: with which clock, how much, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What the checks use of this machine; tests pass other values.

    Attributes:
        clock: seconds, from any start.
        disk_nbytes: the most that a disk check writes.
        copy_nbytes: the size of one memory copy.
        tier_timeout_s: for all checks of one lower tier.
        otlp_timeout_s: for one attempt to send a span.
        proc: the folder that lists the processes of this host.
        root: the folder that has /sys and the /proc of this process.
    """

    clock: Callable[[], float] = time.perf_counter
    disk_nbytes: int = 64 << 20
    copy_nbytes: int = 32 << 20
    tier_timeout_s: float = 30.0
    otlp_timeout_s: float = 5.0
    proc: Path = Path("/proc")
    root: Path = Path("/")

    def timed(self, call: Callable[[], T]) -> tuple[T, float]:
        """Return the result of ``call``, and the seconds that it took."""
        start = self.clock()
        result = call()
        return result, self.clock() - start


DEFAULTS = CheckOptions()
