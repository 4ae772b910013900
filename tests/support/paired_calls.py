"""Measures calls of candidates that take turns, so that a busy machine disturbs all alike."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median


class PairedCalls:
    """Seconds and CPU seconds of calls, by direction and candidate.

    The n-th calls of all candidates are neighbours: they are compared with each other.

    Args:
        baseline: the candidate to which the others are compared.
        nbytes: the bytes that a call transfers.
    """

    def __init__(self, baseline: str, nbytes: int) -> None:
        self._baseline = baseline
        self._nbytes = nbytes
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._cpu: dict[tuple[str, str], list[float]] = defaultdict(list)

    def measure(self, direction: str, name: str, call: Callable[[], object]) -> None:
        """Make a call of a candidate, and note what it took of this process."""
        begun, cpu = time.perf_counter(), time.process_time()
        call()
        self._seconds[direction, name].append(time.perf_counter() - begun)
        self._cpu[direction, name].append(time.process_time() - cpu)

    def rate(self, direction: str, name: str) -> float:
        """Return the median rate in GB/s."""
        return self._nbytes / median(self._seconds[direction, name]) / 1e9

    def cpu(self, direction: str, name: str) -> float:
        """Return the median CPU seconds per GB."""
        return median(self._cpu[direction, name]) / (self._nbytes / 1e9)

    def rate_ratio(self, direction: str, name: str) -> float:
        """Return the median ratio of a rate to the baseline's in the neighbouring call."""
        return 1 / _median_ratio(self._seconds, direction, name, self._baseline)

    def cpu_ratio(self, direction: str, name: str) -> float:
        """Return the median ratio of CPU seconds to the baseline's in the neighbouring call."""
        return _median_ratio(self._cpu, direction, name, self._baseline)

    def line(self, direction: str) -> str:
        """Return all candidates of a direction, with their ratios in brackets, for people."""
        return "; ".join(
            f"{name} {self.rate(direction, name):.3g} GB/s ({self.rate_ratio(direction, name):.2f})"
            f", {self.cpu(direction, name):.2f} s/GB ({self.cpu_ratio(direction, name):.2f})"
            for found, name in self._seconds
            if found == direction
        )


def _median_ratio(
    values: dict[tuple[str, str], list[float]], direction: str, name: str, baseline: str
) -> float:
    pairs = zip(values[direction, name], values[direction, baseline], strict=True)
    return median(of_name / of_baseline for of_name, of_baseline in pairs)
