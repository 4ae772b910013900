"""Chooses a copy backend for each direction and run size by measuring all backends on the device.

Invariants:

* Until backends were measured, and for copies unlike the measured ones, the default backend copies:
  the first one that is enabled and supports the copy.
* A backend that raised or copied a wrong byte is disabled for good, with a warning.
* A trial compares every copy with the expected bytes, and also the bytes around its runs. Trials
  use memory of their own.
* If a trial itself fails, its caller gets the exception, and no backend is disabled.
"""

from __future__ import annotations

import logging
import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.copy_batch import DIRECTIONS, CopyBatch, Direction

log = logging.getLogger(__name__)

RUN_SIZES: Final = tuple(4096 << doubled for doubled in range(7))
"""The measured sizes of runs, in bytes: 4 to 256 KiB."""

RUN_COUNTS: Final = (32, 512)
"""The measured numbers of runs of a copy.

A copy of another number uses the choice for the next smaller one, for which a kernel's start takes
a larger share of the time."""

MIN_RUNS: Final = RUN_COUNTS[0]
"""A copy of fewer runs uses the default backend."""

# A kernel takes processors from the model and a copy engine does not, so a small gain is no reason
# to replace the default.
_MIN_SPEEDUP = 1.2


class CopyBackend(Protocol):
    """A mechanism that copies batches in the order of the current stream."""

    @property
    def name(self) -> str:
        """The name in log messages."""

    def supports(self, batch: CopyBatch) -> bool:
        """Whether it can copy this batch."""

    def copy(self, batch: CopyBatch) -> None:
        """Queue the copy on the current stream."""


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend for one size and direction, and its speed relative to the default backend."""

    backend: CopyBackend
    speedup: float


Timings = Mapping[tuple[Direction, int, int], Mapping[CopyBackend, float]]
"""By direction, number of runs and run size: the seconds of a copy by each backend."""


class BackendSelector:
    """Copies each batch with the fastest enabled backend that supports it.

    The default of a batch is the first enabled backend that supports it.
    """

    def __init__(self, backends: Sequence[CopyBackend]) -> None:
        self.enabled = tuple(backends)
        self.used: set[str] = set()  # names of those that copied; trials do not count
        # In order of RUN_COUNTS and RUN_SIZES; `None` where no backend is left for such copies.
        self._choices: Mapping[Direction, Sequence[Sequence[BackendChoice | None]]] = {}

    def copy(self, batch: CopyBatch) -> None:
        """Queue the copy on the current stream.

        Raises:
            RuntimeError: when no enabled backend supports the batch.
            Exception: whatever the default backend raises.
        """
        backend = self._select(batch)
        try:
            backend.copy(batch)
            self.used.add(backend.name)
        except Exception as error:
            if backend is self._default(batch):
                raise
            self.disable(backend, f"{type(error).__name__}: {error}")
            # A part may have been queued. This copy follows it and writes the same bytes.
            self.copy(batch)

    def disable(self, backend: CopyBackend, cause: str) -> None:
        """Never use `backend` again."""
        if backend not in self.enabled:
            return
        self.enabled = tuple(other for other in self.enabled if other is not backend)
        log.warning(
            "kvcache: copy backend %s disabled (%s); other backends copy", backend.name, cause
        )

    def choose(self, timings: Timings) -> None:
        """Choose a backend for each direction, number of runs and run size."""
        self._choices = {
            direction: [
                [self._fastest(timings[direction, count, size]) for size in RUN_SIZES]
                for count in RUN_COUNTS
            ]
            for direction in DIRECTIONS
        }
        chosen = "; ".join(_describe(*choices) for choices in self._choices.items())
        log.info("kvcache: copy backends chosen: %s", chosen)

    def _default(self, batch: CopyBatch) -> CopyBackend:
        for backend in self.enabled:
            if backend.supports(batch):
                return backend
        raise RuntimeError("no copy backend works for these pages: others were disabled")

    def _fastest(self, seconds: Mapping[CopyBackend, float]) -> BackendChoice | None:
        measured = [backend for backend in self.enabled if backend in seconds]
        if not measured:
            return None
        default = measured[0]
        fastest = min(measured, key=seconds.__getitem__)
        speedup = seconds[default] / seconds[fastest]
        if speedup >= _MIN_SPEEDUP:
            return BackendChoice(fastest, speedup)
        return BackendChoice(default, 1.0)

    def _select(self, batch: CopyBatch) -> CopyBackend:
        choices = self._choices.get(batch.direction) if batch.direction is not None else None
        if choices and len(batch) >= MIN_RUNS:
            by_size = choices[bisect_right(RUN_COUNTS, len(batch)) - 1]
            # The next larger measured size: a kernel has less to gain there.
            at = bisect_left(RUN_SIZES, int(batch.nbytes.mean()))
            choice = by_size[min(at, len(RUN_SIZES) - 1)]
            if choice and choice.backend in self.enabled and choice.backend.supports(batch):
                return choice.backend
        return self._default(batch)


def _describe(direction: Direction, choices: Sequence[Sequence[BackendChoice | None]]) -> str:
    """Describe choices: "loads of 32 or more runs: ...; of 512 or more: ..."."""
    texts = [_describe_sizes(by_size) for by_size in choices]
    if len(set(texts)) == 1:
        return f"{direction}s: {texts[0]}"
    by_count = zip(RUN_COUNTS, texts, strict=True)
    return "; ".join(f"{direction}s of {count} or more runs: {text}" for count, text in by_count)


def _describe_sizes(choices: Sequence[BackendChoice | None]) -> str:
    """Describe choices: "triton for runs up to 16 KiB (1.4 to 2.1 times as fast), ..."."""
    parts: list[str] = []
    by_size = zip(RUN_SIZES, choices, strict=True)
    for backend, group in groupby(by_size, lambda pair: pair[1] and pair[1].backend):
        sizes, alike = zip(*group, strict=True)
        runs = f" for runs up to {sizes[-1] >> 10} KiB" if sizes[-1] < RUN_SIZES[-1] else ""
        if parts and not runs:
            runs = " for larger runs"
        name, speedup = backend.name if backend else "none", ""
        speedups = [choice.speedup for choice in alike if choice]
        low, high = (f"{choose(speedups, default=1.0):.1f}" for choose in (min, max))
        if high != "1.0":
            speedup = f" ({low if low == high else f'{low} to {high}'} times as fast)"
        parts.append(f"{name}{runs}{speedup}")
    return ", ".join(parts)


ByteArray = NDArray[np.uint8]

_MIN_SECONDS = 1e-9  # no clock measures less; it keeps the speedup finite


@dataclass(frozen=True, slots=True)
class TrialSize:
    """How much a trial copies."""

    scratch_nbytes: int = 2 * MIN_RUNS * RUN_SIZES[-1]
    """Bytes on each side: twice the most that a copy writes, as the rest must stay unchanged."""
    runs: int = RUN_COUNTS[-1]
    """The most runs of a copy."""
    rounds: int = 5
    """How often each copy is made. The median counts, so the first time may compile a kernel."""


FULL_TRIAL: Final = TrialSize()


class TrialMemory(Protocol):
    """The memory of one side."""

    @property
    def address(self) -> int:
        """The address of the first byte."""

    def write(self, data: ByteArray) -> None:
        """Overwrite the first bytes."""

    def clear(self, nbytes: int) -> None:
        """Set the first `nbytes` bytes to zero."""

    def read(self, nbytes: int) -> ByteArray:
        """Return the first `nbytes` bytes."""


class TrialScratch(Protocol):
    """Memory of `nbytes` on each side for trials alone, and a current stream.

    When a method returns or raises, the stream has no work left.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def host(self) -> TrialMemory: ...

    @property
    def device(self) -> TrialMemory: ...

    def batch(self, targets: Integers, sources: Integers, nbytes: Integers) -> CopyBatch:
        """As `PinnedRanges.batch`."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Call `work`, and return how long the device took for the work that it queued."""


class _BackendError(Exception):
    """A backend raised, or copied wrong bytes."""


def run_trial(
    selector: BackendSelector, scratch: TrialScratch, size: TrialSize = FULL_TRIAL
) -> None:
    """Measure all enabled backends, disable those that fail, and choose among the others.

    Raises:
        Exception: when the trial itself fails; then nothing is chosen.
    """
    random = np.random.default_rng(0)
    data = random.integers(0, 256, scratch.nbytes, dtype=np.uint8)
    timings: dict[tuple[Direction, int, int], dict[CopyBackend, float]] = {}
    for direction, run_nbytes in product(DIRECTIONS, RUN_SIZES):
        by_runs: dict[int, dict[CopyBackend, float]] = {}
        for count in RUN_COUNTS:
            # Of large runs only a few fit, so two counts may lead to the same copy.
            runs = min(count, size.runs, scratch.nbytes // run_nbytes // 2)
            if runs not in by_runs:
                rows = data[: 2 * runs * run_nbytes].reshape(-1, run_nbytes)
                copy = _TrialCopy(scratch, direction, rows, random)
                by_runs[runs] = _measure_copy(selector, scratch, copy, size.rounds)
            timings[direction, count, run_nbytes] = by_runs[runs]
    if selector.enabled:
        selector.choose(timings)


class _TrialCopy:
    """A copy of random rows of `rows`, half of them, to random places in as much memory.

    Args:
        scratch: the memory of both sides.
        direction: of the copy.
        rows: the bytes from which the copy reads; a row is a run.
        random: chooses the runs and the places.

    Attributes:
        target: the memory that the copy writes.
        batch: the copy.
        expected: the first bytes of `target` after the copy, if they were zeros before it.
    """

    def __init__(
        self,
        scratch: TrialScratch,
        direction: Direction,
        rows: ByteArray,
        random: np.random.Generator,
    ) -> None:
        source, self.target = scratch.host, scratch.device
        if direction == "store":
            source, self.target = self.target, source
        places, run_nbytes = rows.shape
        read, written = (random.permutation(places)[: places // 2] for _ in range(2))
        source.write(rows.ravel())
        self.batch = scratch.batch(
            self.target.address + written * run_nbytes,
            source.address + read * run_nbytes,
            np.full(len(read), run_nbytes, dtype=np.int64),
        )
        expected = np.zeros_like(rows)
        expected[written] = rows[read]
        self.expected = expected.ravel()


def _measure_copy(
    selector: BackendSelector, scratch: TrialScratch, copy: _TrialCopy, rounds: int
) -> dict[CopyBackend, float]:
    """Return the median seconds of this copy by each backend that supports it, taken in turns."""
    seconds: dict[CopyBackend, list[float]] = defaultdict(list)
    nbytes = copy.expected.nbytes
    for _ in range(rounds):
        for backend in selector.enabled:
            if backend.supports(copy.batch):
                copy.target.clear(nbytes)
                try:
                    seconds[backend].append(scratch.seconds(partial(_copy, backend, copy.batch)))
                    _compare(copy.target.read(nbytes), copy.expected, copy.batch)
                except _BackendError as error:
                    selector.disable(backend, str(error))
    return {
        backend: max(statistics.median(samples), _MIN_SECONDS)
        for backend, samples in seconds.items()
        if backend in selector.enabled
    }


def _copy(backend: CopyBackend, batch: CopyBatch) -> None:
    try:
        backend.copy(batch)
    except Exception as error:
        raise _BackendError(f"{type(error).__name__}: {error}") from error


def _compare(actual: ByteArray, expected: ByteArray, batch: CopyBatch) -> None:
    if wrong := int(np.count_nonzero(actual != expected)):
        raise _BackendError(
            f"{wrong} wrong bytes in a trial {batch.direction} of {len(batch)} runs of"
            f" {batch.nbytes[0]} bytes"
        )
