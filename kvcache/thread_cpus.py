"""The CPUs that a thread may use.

An engine may pin each of its threads to one CPU. A new thread inherits the CPU of the thread that
starts it, and would take turns there with the engine.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path


def process_cpus() -> set[int]:
    """Return the CPUs that at least one thread of this process may use."""
    cpus: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # the thread has ended
            cpus |= os.sched_getaffinity(int(thread.name))
    return cpus


def use_cpus(cpus: Collection[int]) -> None:
    """Let the calling thread use these CPUs; where this is forbidden, it keeps those it has."""
    with suppress(OSError):
        os.sched_setaffinity(0, cpus)
