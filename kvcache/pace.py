"""How long something takes that is done to several blocks at once, learned from how long it took.

Pure, but for a lock. Always true: nothing is said before something was told; what is said is at
least 0 and does not fall as blocks are added.
"""

from __future__ import annotations

import threading

_KEEP = 0.7  # of the weight of what was told, with each new telling: the last few count


class Pace:
    """The line ``seconds = latency + blocks * each`` that fits what was told best, lately.

    Weighted least squares, older tellings counting less. Safe to call from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weight = self._n = self._s = self._nn = self._ns = 0.0
        self._most = 0.0  # blocks told of at once, lately

    @property
    def known(self) -> bool:
        """Whether anything was told."""
        return self._weight > 0

    def told(self, blocks: float, seconds: float) -> None:
        """``blocks``, more than none, took so long together."""
        with self._lock:
            self._weight = _KEEP * self._weight + 1
            self._n = _KEEP * self._n + blocks
            self._s = _KEEP * self._s + seconds
            self._nn = _KEEP * self._nn + blocks * blocks
            self._ns = _KEEP * self._ns + blocks * seconds
            self._most = max(_KEEP * self._most, blocks)

    def least(self, blocks: float) -> float | None:
        """Seconds for ``blocks``, by the line also beyond what was told of: no bound is meant."""
        with self._lock:
            return self._line(blocks)

    def most(self, blocks: float) -> float | None:
        """Seconds for ``blocks``; beyond what was told of, as many times more as there are more."""
        with self._lock:
            known = self._line(min(blocks, self._most))
            return known and known * max(1.0, blocks / self._most)

    def _line(self, blocks: float) -> float | None:
        if not self._weight:
            return None
        n, s = self._n / self._weight, self._s / self._weight
        spread = self._nn / self._weight - n * n
        if spread <= 1e-6 * n * n:  # all of one size: through the origin
            return s / n * blocks
        each = max(0.0, (self._ns / self._weight - n * s) / spread)
        latency = s - each * n
        return latency + each * blocks if latency > 0 else s / n * blocks
