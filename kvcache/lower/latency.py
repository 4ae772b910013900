"""Predicts how long a call on several blocks takes, from the durations of earlier calls.

No I/O. Invariants: a model returns ``None`` until its first sample; a prediction is at least
0 and does not fall as the number of blocks grows.
"""

from __future__ import annotations

import threading

_DECAY = 0.7  # of the weight of older samples, per new sample: the last few samples dominate
_DEPTH_DECAY = 0.99  # slower, because only rare long prompts show the cost of depth
_MAX_EXTRAPOLATION = 4  # of the cost of depth, as a multiple of the deepest sample's depth


class LatencyModel:
    """The line ``seconds = latency + blocks * slope`` that fits the recent samples best.

    Weighted least squares; older samples weigh less. Safe to call from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weighted sums over the samples; n is blocks, s is seconds.
        self._weight = self._n = self._s = self._nn = self._ns = 0.0
        self._largest = 0.0  # blocks of the largest recent sample

    @property
    def known(self) -> bool:
        """Whether there is a sample."""
        return self._weight > 0

    def observe(self, blocks: float, seconds: float) -> None:
        """Add a sample: one call on ``blocks`` (above 0) took ``seconds``."""
        with self._lock:
            self._weight = _DECAY * self._weight + 1
            self._n = _DECAY * self._n + blocks
            self._s = _DECAY * self._s + seconds
            self._nn = _DECAY * self._nn + blocks * blocks
            self._ns = _DECAY * self._ns + blocks * seconds
            self._largest = max(_DECAY * self._largest, blocks)

    def optimistic(self, blocks: float) -> float | None:
        """Seconds for ``blocks`` by the line, also beyond the largest sample."""
        with self._lock:
            return self._line(blocks)

    def pessimistic(self, blocks: float) -> float | None:
        """Seconds for ``blocks``; beyond the largest sample, its time scaled in proportion."""
        with self._lock:
            seconds = self._line(min(blocks, self._largest))
            return seconds and seconds * max(1.0, blocks / self._largest)

    def _line(self, blocks: float) -> float | None:
        if not self._weight:
            return None
        n, s = self._n / self._weight, self._s / self._weight
        spread = self._nn / self._weight - n * n
        if spread <= 1e-6 * n * n:  # all samples have one size: a line through the origin
            return s / n * blocks
        slope = max(0.0, (self._ns / self._weight - n * s) / spread)
        latency = s - slope * n
        return latency + slope * blocks if latency > 0 else s / n * blocks


class ComputeModel:
    """Predicts how long an engine computes: ``seconds = line(blocks) + slope * context``.

    The context of a step is the number of blocks before each computed block, summed over the
    computed blocks, because attention reads them. For one prompt it grows with the square of the
    length. The slope is the least-squares fit of ``seconds = a * blocks + slope * context`` to the
    last hundred steps or so; the few steps with long prompts weigh most. The line then fits
    ``seconds - slope * context`` of the last few steps. Steps that all have one depth cannot
    separate the two costs, and give a slope of 0.

    Safe to call from several threads. Returns ``None`` until the first sample.
    """

    def __init__(self) -> None:
        self._line = LatencyModel()
        self._lock = threading.Lock()
        # Weighted sums over the samples; n is blocks, c is context, s is seconds.
        self._nn = self._nc = self._cc = self._ns = self._cs = 0.0
        self._slope = 0.0
        self._deepest = 0.0  # the largest mean depth of a recent step

    @property
    def known(self) -> bool:
        """Whether there is a sample."""
        return self._line.known

    def observe(self, blocks: float, seconds: float, depth: float | None = None) -> None:
        """Add a sample: one step computed ``blocks`` (above 0) in ``seconds``.

        Args:
            depth: the number of blocks before a computed block, averaged over the computed blocks;
                ``None`` if the step computed one prompt from its first block.
        """
        depth = blocks / 2 if depth is None else depth
        with self._lock:
            context = blocks * depth
            self._nn = _DEPTH_DECAY * self._nn + blocks * blocks
            self._nc = _DEPTH_DECAY * self._nc + blocks * context
            self._cc = _DEPTH_DECAY * self._cc + context * context
            self._ns = _DEPTH_DECAY * self._ns + blocks * seconds
            self._cs = _DEPTH_DECAY * self._cs + context * seconds
            self._deepest = max(_DEPTH_DECAY * self._deepest, depth)
            self._slope = self._fit()
            flat = max(0.0, seconds - self._slope * context)
        self._line.observe(blocks, flat)

    def pessimistic(self, blocks: float, start: float = 0.0) -> float | None:
        """Seconds to compute ``blocks`` that follow the first ``start`` blocks of a prompt.

        The line is scaled as in :meth:`LatencyModel.pessimistic`. Beyond four times the depth of
        the deepest sample, a block costs no more than at that depth. The estimate is then too low,
        so the engine computes such prompts, and their samples show the real cost.
        """
        flat = self._line.pessimistic(blocks)
        if flat is None:
            return None
        with self._lock:
            max_depth = _MAX_EXTRAPOLATION * self._deepest
            within = min(max(max_depth - start, 0.0), blocks)  # blocks not deeper than max_depth
            context = within * (start + within / 2) + (blocks - within) * max_depth
            return flat + self._slope * context

    def _fit(self) -> float:
        spread = self._nn * self._cc - self._nc * self._nc
        if spread <= 1e-6 * self._nn * self._cc:  # all samples have one depth
            return 0.0
        slope = (self._nn * self._cs - self._nc * self._ns) / spread
        return min(max(slope, 0.0), self._cs / self._cc)  # neither cost is negative
