"""Several ways to make the same copy; which one makes it is what was measured on this device.

Always true here:
* Until they have been tried, and wherever nothing was measured, the first that is left copies.
* One that has failed, or left a byte other than it should be, is not used again; that is said.

Every mechanism tried on memory that is nobody's: what it takes, and whether its bytes are right.

Always true here:
* Every copy is compared with what it should be, and so are the bytes around its runs.
* What the trial itself cannot do is its caller's to hear, and counts against no mechanism.
"""

from __future__ import annotations

import logging
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache.connectors.transfer.base import Integers

log = logging.getLogger(__name__)

Direction = Literal["load", "store"]
DIRECTIONS: tuple[Direction, ...] = ("load", "store")

SIZES = tuple(4096 << doubled for doubled in range(7))  # of runs, 4 to 256 KiB, that are tried
FEW = 32  # runs: copies of fewer are not tried

# Times as fast as the first: a kernel takes from the model what a copy engine does not.
_CLEARLY = 1.2


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """What is to be copied: `nbytes[i]` bytes from the address `sources[i]` to `targets[i]`.

    `way` is known where all the host's side is pinned, and the device has it at these addresses.
    """

    targets: Integers
    sources: Integers
    nbytes: Integers
    way: Direction | None

    def __len__(self) -> int:
        return len(self.nbytes)


class Mechanism(Protocol):
    """A way to copy runs. It is over when the stream is past it that is current during the call."""

    @property
    def name(self) -> str:
        """As people are told, after "by"."""

    def takes(self, runs: CopyBatch) -> bool:
        """Whether it can copy these."""

    def copy(self, runs: CopyBatch) -> None:
        """Begin to copy them."""


@dataclass(frozen=True, slots=True)
class Best:
    """What copies runs of one size one way, and how many times as fast as the first mechanism."""

    mechanism: Mechanism
    gain: float


Took = Mapping[tuple[Direction, int], Mapping[Mechanism, float]]
"""Seconds of a copy of runs of a size, one way, by each mechanism that makes it."""


class Pinned:
    """Host memory that the device can touch at the host's addresses."""

    def __init__(self) -> None:
        self._pieces: dict[int, int] = {}
        self._spans: list[tuple[int, int]] = []  # of pieces side by side, replaced as a whole

    def add(self, address: int, nbytes: int) -> None:
        self._pieces[address] = nbytes
        self._join()

    def remove(self, address: int) -> None:
        self._pieces.pop(address, None)
        self._join()

    def runs(self, targets: Integers, sources: Integers, nbytes: Integers) -> CopyBatch:
        """These, with the way that they go."""
        way: Direction | None = None
        if self._holds(targets, nbytes):
            way = "store"
        elif self._holds(sources, nbytes):
            way = "load"
        return CopyBatch(targets, sources, nbytes, way)

    def _holds(self, addresses: Integers, nbytes: Integers) -> bool:
        if not len(addresses):
            return False
        begin, end = addresses.min(), (addresses + nbytes).max()
        return any(low <= begin and end <= high for low, high in self._spans)

    def _join(self) -> None:
        spans: list[tuple[int, int]] = []
        for address, nbytes in sorted(self._pieces.items()):
            if spans and spans[-1][1] == address:
                spans[-1] = (spans[-1][0], address + nbytes)
            else:
                spans.append((address, address + nbytes))
        self._spans = spans


class Mechanisms:
    """Copies by the best of `offered`; the first is the one that needs no measuring."""

    def __init__(self, offered: Sequence[Mechanism]) -> None:
        self.left = tuple(offered)
        self._best: Mapping[Direction, Sequence[Best]] = {}

    def copy(self, runs: CopyBatch) -> None:
        """Begin to copy.

        Raises:
            RuntimeError: when no mechanism is left; and whatever the first one raises.
        """
        chosen = self._chosen(runs)
        try:
            chosen.copy(runs)
        except Exception as error:
            if chosen is self.first:
                raise
            self.drop(chosen, f"{type(error).__name__}: {error}")
            self.copy(runs)  # whatever it began: this comes after it, with the same bytes

    @property
    def first(self) -> Mechanism:
        if not self.left:
            raise RuntimeError("there is no mechanism left that copies right on this device")
        return self.left[0]

    def drop(self, mechanism: Mechanism, why: str) -> None:
        """Use it no more."""
        if mechanism not in self.left:
            return
        self.left = tuple(other for other in self.left if other is not mechanism)
        log.warning("kvcache: nothing is copied by %s any more: %s", mechanism.name, why)

    def learn(self, took: Took) -> None:
        """Choose by what copies took."""
        self._best = {way: [self._fastest(took[way, size]) for size in SIZES] for way in DIRECTIONS}
        log.info("kvcache: %s", "; ".join(_said(way, bests) for way, bests in self._best.items()))

    def _fastest(self, took: Mapping[Mechanism, float]) -> Best:
        first = self.first
        fastest = min((each for each in self.left if each in took), key=took.__getitem__)
        gain = took[first] / took[fastest]
        return Best(fastest, gain) if gain >= _CLEARLY else Best(first, 1.0)

    def _chosen(self, runs: CopyBatch) -> Mechanism:
        if runs.way is not None and runs.way in self._best and len(runs) >= FEW:
            # Between two sizes that were tried, what is better for the larger: a kernel has less
            # to gain there.
            at = bisect_left(SIZES, int(runs.nbytes.mean()))
            best = self._best[runs.way][min(at, len(SIZES) - 1)].mechanism
            if best in self.left and best.takes(runs):
                return best
        return self.first


def _said(way: Direction, bests: Sequence[Best]) -> str:
    """Such as "loads of runs up to 16 KiB by a kernel (1.4 to 2.1 times as fast), ..."."""
    said: list[str] = []
    for mechanism, group in groupby(zip(SIZES, bests, strict=True), lambda pair: pair[1].mechanism):
        sizes, alike = zip(*group, strict=True)
        whose = f" of runs up to {sizes[-1] >> 10} KiB" if sizes[-1] < SIZES[-1] else ""
        if said and not whose:
            whose = " of larger ones"
        low, high = (f"{choice(best.gain for best in alike):.1f}" for choice in (min, max))
        gain = f" ({low if low == high else f'{low} to {high}'} times as fast)"
        said.append(f"{whose} by {mechanism.name}{gain if high != '1.0' else ''}")
    return f"{way}s{','.join(said)}"


Bytes = NDArray[np.uint8]

_RUNS = 512  # in a copy, at most: what a call costs does not hide what a run costs
_TICK = 1e-9  # seconds: less than any clock tells apart
_ROUNDS = 5  # of all mechanisms in turns; one that compiles first is no median


class TrialMemory(Protocol):
    """One side's bytes."""

    @property
    def address(self) -> int:
        """Of the first one."""

    def put(self, data: Bytes) -> None:
        """Write all of them."""

    def clear(self) -> None:
        """Make zeros of them."""

    def get(self) -> Bytes:
        """Read all of them."""


class Scratch(Protocol):
    """Memory of `nbytes` on each side, for nothing else, and a stream that is current.

    What the stream was given is over when a method returns or raises.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def host(self) -> TrialMemory: ...

    @property
    def device(self) -> TrialMemory: ...

    def runs(self, targets: Integers, sources: Integers, nbytes: Integers) -> CopyBatch:
        """These, with the way that they go."""

    def seconds(self, work: Callable[[], None]) -> float:
        """What the device took for what `work` gave it; raises what that raises."""


class _MechanismError(Exception):
    """A mechanism raised, or left wrong bytes."""


def measure(mechanisms: Mechanisms, scratch: Scratch) -> None:
    """Try all that are left, drop those that fail, and have the best of the others chosen.

    Raises:
        Exception: whatever was in the way of trying; nothing is chosen then.
    """
    random, took = np.random.default_rng(0), {}
    for way in DIRECTIONS:
        source, target = scratch.host, scratch.device
        if way == "store":
            source, target = target, source
        data = random.integers(0, 256, scratch.nbytes, dtype=np.uint8)
        source.put(data)
        for size in SIZES:
            places = scratch.nbytes // size
            count = min(_RUNS, places // 2)
            read, written = (random.permutation(places)[:count] for _ in range(2))
            runs = scratch.runs(
                target.address + written * size,
                source.address + read * size,
                np.full(count, size, dtype=np.int64),
            )
            right = np.zeros_like(data)
            right.reshape(places, size)[written] = data.reshape(places, size)[read]
            took[way, size] = _in_turns(mechanisms, scratch, runs, target, right)
    if mechanisms.left:
        mechanisms.learn(took)


def _in_turns(
    mechanisms: Mechanisms, scratch: Scratch, runs: CopyBatch, target: TrialMemory, right: Bytes
) -> dict[Mechanism, float]:
    """Seconds of these runs by each mechanism that takes them, the median of rounds."""
    took: dict[Mechanism, list[float]] = defaultdict(list)
    for _ in range(_ROUNDS):
        for mechanism in mechanisms.left:
            if mechanism.takes(runs):
                target.clear()
                try:
                    took[mechanism].append(scratch.seconds(partial(_copy, mechanism, runs)))
                    _compare(target.get(), right, runs)
                except _MechanismError as why:
                    mechanisms.drop(mechanism, str(why))
    return {
        mechanism: max(statistics.median(seconds), _TICK)
        for mechanism, seconds in took.items()
        if mechanism in mechanisms.left
    }


def _copy(mechanism: Mechanism, runs: CopyBatch) -> None:
    try:
        mechanism.copy(runs)
    except Exception as error:
        raise _MechanismError(f"{type(error).__name__}: {error}") from error


def _compare(found: Bytes, right: Bytes, runs: CopyBatch) -> None:
    if wrong := int(np.count_nonzero(found != right)):
        raise _MechanismError(
            f"when it was tried on {len(runs)} runs of {runs.nbytes[0]} bytes, a {runs.way},"
            f" {wrong} bytes were wrong"
        )
