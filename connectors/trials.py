"""Every mechanism tried on memory that is nobody's: what it takes, and whether its bytes are right.

Always true here:
* Every copy is compared with what it should be, and so are the bytes around its runs.
* What the trial itself cannot do is its caller's to hear, and counts against no mechanism.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache.connectors.copier import Integers
from kvcache.connectors.mechanisms import SIZES, WAYS, Mechanism, Mechanisms, Runs

Bytes = NDArray[np.uint8]

_RUNS = 512  # in a copy, at most: what a call costs does not hide what a run costs
_TICK = 1e-9  # seconds: less than any clock tells apart
_ROUNDS = 5  # of all mechanisms in turns; one that compiles first is no median


class Memory(Protocol):
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
    def host(self) -> Memory: ...

    @property
    def device(self) -> Memory: ...

    def runs(self, targets: Integers, sources: Integers, nbytes: Integers) -> Runs:
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
    for way in WAYS:
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
    mechanisms: Mechanisms, scratch: Scratch, runs: Runs, target: Memory, right: Bytes
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


def _copy(mechanism: Mechanism, runs: Runs) -> None:
    try:
        mechanism.copy(runs)
    except Exception as error:
        raise _MechanismError(f"{type(error).__name__}: {error}") from error


def _compare(found: Bytes, right: Bytes, runs: Runs) -> None:
    if wrong := int(np.count_nonzero(found != right)):
        raise _MechanismError(
            f"when it was tried on {len(runs)} runs of {runs.nbytes[0]} bytes, a {runs.way},"
            f" {wrong} bytes were wrong"
        )
