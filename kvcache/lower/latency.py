"""How long something takes that is done to several blocks at once, learned from how long it took.

Pure, but for a lock. Always true: nothing is said before something was told; what is said is at
least 0 and does not fall as blocks are added.
"""

from __future__ import annotations

import threading

_KEEP = 0.7  # of the weight of what was told, with each new telling: the last few count
_KEEP_DEPTH = 0.99  # the same for the cost of depth, which long prompts show, and they are rare
_DEEPER = 4  # times as deep as the deepest sample, up to which the cost of depth is extrapolated


class LatencyModel:
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

    def observe(self, blocks: float, seconds: float) -> None:
        """``blocks``, more than none, took so long together."""
        with self._lock:
            self._weight = _KEEP * self._weight + 1
            self._n = _KEEP * self._n + blocks
            self._s = _KEEP * self._s + seconds
            self._nn = _KEEP * self._nn + blocks * blocks
            self._ns = _KEEP * self._ns + blocks * seconds
            self._most = max(_KEEP * self._most, blocks)

    def optimistic(self, blocks: float) -> float | None:
        """Seconds for ``blocks``, by the line also beyond what was told of: no bound is meant."""
        with self._lock:
            return self._line(blocks)

    def pessimistic(self, blocks: float) -> float | None:
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


class ComputeModel:
    """How long an engine computes: ``seconds = line(blocks) + slope * context``.

    The context of a step is, summed over its blocks, the blocks before each of them: attention
    reads them. For a prompt it grows with the square of its length. The slope is the least-squares
    fit of ``seconds = each * blocks + slope * context`` to the last hundred steps or so, among
    which the few of long prompts weigh most; the line fits what the slope leaves of the last few.
    Steps of one depth alone do not tell the two apart, and give no slope.

    Safe to call from several threads. Returns ``None`` until the first sample.
    """

    def __init__(self) -> None:
        self._line = LatencyModel()
        self._lock = threading.Lock()
        self._nn = self._nc = self._cc = self._ns = self._cs = 0.0
        self._slope = 0.0
        self._deepest = 0.0  # mean depth of a step, lately

    @property
    def known(self) -> bool:
        """Whether there was a sample."""
        return self._line.known

    def observe(self, blocks: float, seconds: float, depth: float | None = None) -> None:
        """One step computed ``blocks``, more than none, in ``seconds``.

        Args:
            depth: blocks before a computed block, the mean over them; ``None`` is the mean of one
                prompt that is computed from its first block.
        """
        depth = blocks / 2 if depth is None else depth
        with self._lock:
            context = blocks * depth
            self._nn = _KEEP_DEPTH * self._nn + blocks * blocks
            self._nc = _KEEP_DEPTH * self._nc + blocks * context
            self._cc = _KEEP_DEPTH * self._cc + context * context
            self._ns = _KEEP_DEPTH * self._ns + blocks * seconds
            self._cs = _KEEP_DEPTH * self._cs + context * seconds
            self._deepest = max(_KEEP_DEPTH * self._deepest, depth)
            self._slope = self._fit()
            flat = max(0.0, seconds - self._slope * context)
        self._line.observe(blocks, flat)

    def pessimistic(self, blocks: float, start: float = 0.0) -> float | None:
        """Seconds to compute ``blocks`` after the first ``start`` of a prompt.

        The line is scaled as by :meth:`LatencyModel.pessimistic`. Beyond four times the
        depth of the deepest sample, a block costs no more than at that depth: the engine then
        computes such prompts, and their samples show the real cost.
        """
        flat = self._line.pessimistic(blocks)
        if flat is None:
            return None
        with self._lock:
            limit = _DEEPER * self._deepest
            below = min(max(limit - start, 0.0), blocks)
            context = below * (start + below / 2) + (blocks - below) * limit
            return flat + self._slope * context

    def _fit(self) -> float:
        spread = self._nn * self._cc - self._nc * self._nc
        if spread <= 1e-6 * self._nn * self._cc:  # all of one depth
            return 0.0
        slope = (self._nn * self._cs - self._nc * self._ns) / spread
        return min(max(slope, 0.0), self._cs / self._cc)  # neither part is negative
