"""Which of several mechanisms copies: the fastest that was right, and never one that was wrong."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

pytest.importorskip("numpy")

import numpy as np

from kvcache.connectors.transfer.autotune import (
    FEW,
    SIZES,
    Bytes,
    CopyBatch,
    Direction,
    Mechanisms,
    Pinned,
    measure,
)
from kvcache.connectors.transfer.base import Integers

KIB = 1024


@dataclass
class Clock:
    at: float = 0.0


@dataclass(eq=False)
class Played:
    """Copies at once, takes `cost` seconds for a run of so many bytes; may be told to go wrong."""

    name: str
    clock: Clock
    cost: Callable[[Direction | None, int], float]
    takes_only: int = 1  # runs that begin and end on so many bytes
    wrong: Callable[[CopyBatch], bool] = lambda runs: False
    raises: Callable[[CopyBatch], bool] = lambda runs: False
    calls: list[CopyBatch] = field(default_factory=list)

    def takes(self, runs: CopyBatch) -> bool:
        return runs.way is not None and not (runs.nbytes % self.takes_only).any()

    def copy(self, runs: CopyBatch) -> None:
        self.calls.append(runs)
        if self.raises(runs):
            raise OSError("it does not work here")
        for target, source, nbytes in zip(runs.targets, runs.sources, runs.nbytes, strict=True):
            self.clock.at += self.cost(runs.way, int(nbytes))
            ctypes.memmove(int(target), int(source), int(nbytes))
        if self.wrong(runs):
            ctypes.memset(int(runs.targets[-1] + runs.nbytes[-1] - 1), 0x5A, 1)


class Arena:
    """Memory of this process, as one side's."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.zeros(nbytes, dtype=np.uint8)
        self.address = self.bytes.ctypes.data

    def put(self, data: Bytes) -> None:
        self.bytes[:] = data

    def clear(self) -> None:
        self.bytes[:] = 0

    def get(self) -> Bytes:
        return self.bytes


class Scratch:
    nbytes = 1 << 20

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.host, self.device = Arena(self.nbytes), Arena(self.nbytes)
        self.pinned = Pinned()
        self.pinned.add(self.host.address, self.nbytes)
        self.runs = self.pinned.runs

    def seconds(self, work: Callable[[], None]) -> float:
        begun = self.clock.at
        work()
        return self.clock.at - begun


class World:
    """A copy engine, to which every run costs 2 us, and a kernel, to which bytes cost more."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.engine = Played("the copy engine", self.clock, self.engine_costs)
        self.kernel = Played("a kernel", self.clock, self.kernel_costs, takes_only=16)
        self.mechanisms = Mechanisms([self.engine, self.kernel])
        self.scratch = Scratch(self.clock)

    def engine_costs(self, way: Direction | None, nbytes: int) -> float:
        return 2e-6 + nbytes / 50e9

    def kernel_costs(self, way: Direction | None, nbytes: int) -> float:
        return 0.1e-6 + nbytes / (30e9 if way == "load" else 5e9)

    def runs(self, count: int, nbytes: int, way: Direction | None = "load") -> CopyBatch:
        """Of memory that is nobody's: what is copied does not matter."""
        memory = np.zeros((2, count, nbytes), dtype=np.uint8)
        self.memory = memory
        at = np.arange(count, dtype=np.int64) * nbytes + memory.ctypes.data
        return CopyBatch(at, at + count * nbytes, np.full(count, nbytes, dtype=np.int64), way)

    def by(self, count: int, nbytes: int, way: Direction | None = "load") -> str:
        """What copies so many runs of so many bytes."""
        before = {each: len(each.calls) for each in (self.engine, self.kernel)}
        self.mechanisms.copy(self.runs(count, nbytes, way))
        [copied] = [each.name for each, calls in before.items() if len(each.calls) > calls]
        return copied


@pytest.fixture
def world() -> World:
    return World()


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_until_they_are_tried_the_first_copies(world: World) -> None:
    assert world.by(64, 4 * KIB) == "the copy engine"


def test_the_fastest_copies_where_it_is_clearly_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        measure(world.mechanisms, world.scratch)
    # Of loads the kernel is 1.2 times as fast up to 74 KB or so, of stores up to 10.
    assert [world.by(FEW, size) for size in SIZES] == [
        *["a kernel"] * 5, *["the copy engine"] * 2
    ]  # fmt: skip
    assert [world.by(FEW, size, "store") for size in SIZES[:3]] == [
        *["a kernel"] * 2, "the copy engine"
    ]  # fmt: skip
    [told] = said(caplog, logging.INFO)
    assert told == (
        "kvcache: loads of runs up to 64 KiB by a kernel (1.4 to 8.8 times as fast), of larger"
        " ones by the copy engine; stores of runs up to 8 KiB by a kernel (1.2 to 2.3 times as"
        " fast), of larger ones by the copy engine"
    )


def test_what_was_not_measured_is_copied_by_the_first(world: World) -> None:
    measure(world.mechanisms, world.scratch)
    assert world.by(FEW, 4 * KIB) == "a kernel"
    assert world.by(FEW - 1, 4 * KIB) == "the copy engine"  # too few
    assert world.by(FEW, 4 * KIB, None) == "the copy engine"  # not pinned
    assert world.by(FEW, 4 * KIB + 8) == "the copy engine"  # the kernel does not take it
    assert world.by(FEW, 64 * KIB + 16) == "the copy engine"  # of the larger size that was tried
    assert world.by(FEW, 512 * KIB) == "the copy engine"  # larger than any
    world.mechanisms.copy(world.runs(0, 16))  # and a copy of nothing is none


def test_a_copy_of_mixed_sizes_goes_by_their_mean(world: World) -> None:
    measure(world.mechanisms, world.scratch)
    runs = world.runs(2 * FEW, 112 * KIB)
    runs.nbytes[::2] = 16
    before = len(world.kernel.calls)
    world.mechanisms.copy(runs)
    assert len(world.kernel.calls) == before + 1
    runs.nbytes[::2] = 17 * KIB
    world.mechanisms.copy(runs)
    assert len(world.kernel.calls) == before + 1


@pytest.mark.parametrize("way", ["load", "store"])
@pytest.mark.parametrize("size", [4 * KIB, 256 * KIB])
def test_what_leaves_a_wrong_byte_anywhere_is_never_used(
    world: World, way: Direction, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    world.kernel.wrong = lambda runs: runs.way == way and int(runs.nbytes[0]) == size
    with caplog.at_level(logging.INFO):
        measure(world.mechanisms, world.scratch)
    assert said(caplog, logging.INFO) == [
        "kvcache: loads by the copy engine; stores by the copy engine"
    ]
    count = min(512, world.scratch.nbytes // size // 2)
    [told] = said(caplog, logging.WARNING)
    assert told == (
        "kvcache: nothing is copied by a kernel any more: when it was tried on"
        f" {count} runs of {size} bytes, a {way}, 1 bytes were wrong"
    )
    assert world.by(64, 4 * KIB) == world.by(64, 4 * KIB, "store") == "the copy engine"


def test_what_writes_beside_its_runs_is_never_used(world: World) -> None:
    copy = world.kernel.copy

    def beside(runs: CopyBatch) -> None:
        copy(runs)
        last = int(runs.targets.max() + runs.nbytes[0])
        ctypes.memset(last if last < end(runs) else int(runs.targets.min() - 1), 0x5A, 1)

    def end(runs: CopyBatch) -> int:
        side = world.scratch.device if runs.way == "load" else world.scratch.host
        return side.address + world.scratch.nbytes

    world.kernel.copy = beside  # type: ignore[method-assign]
    measure(world.mechanisms, world.scratch)
    assert world.mechanisms.left == (world.engine,)


def test_what_does_nothing_is_never_used(world: World) -> None:
    world.kernel.copy = lambda runs: None  # type: ignore[method-assign]
    measure(world.mechanisms, world.scratch)
    assert world.mechanisms.left == (world.engine,)


def test_what_raises_when_it_is_tried_is_not_used(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.kernel.raises = lambda runs: True
    measure(world.mechanisms, world.scratch)
    assert said(caplog, logging.WARNING) == [
        "kvcache: nothing is copied by a kernel any more: OSError: it does not work here"
    ]
    assert world.by(64, 4 * KIB) == "the copy engine"


def test_the_first_one_too_has_to_be_right(world: World) -> None:
    world.engine.wrong = lambda runs: True
    measure(world.mechanisms, world.scratch)
    assert world.by(64, 256 * KIB) == "a kernel"


def test_when_none_is_right_nothing_is_copied(world: World) -> None:
    world.engine.wrong = world.kernel.wrong = lambda runs: True
    measure(world.mechanisms, world.scratch)
    with pytest.raises(RuntimeError, match="no mechanism left"):
        world.mechanisms.copy(world.runs(64, 4 * KIB))


def test_what_raises_later_is_replaced_in_the_same_call(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    measure(world.mechanisms, world.scratch)
    world.kernel.raises = lambda runs: True
    runs = world.runs(64, 4 * KIB)
    world.memory[1] = 7
    for _ in range(2):
        world.memory[0] = 0
        calls = len(world.kernel.calls), len(world.engine.calls)
        world.mechanisms.copy(runs)
        assert (world.memory[0] == 7).all()
    assert (len(world.kernel.calls), len(world.engine.calls)) == (calls[0], calls[1] + 1)
    assert len(said(caplog, logging.WARNING)) == 1


def test_what_is_dropped_twice_is_said_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        world.mechanisms.drop(world.kernel, "in the trial and in a copy at once")
    assert len(said(caplog, logging.WARNING)) == 1


def test_what_takes_no_time_is_fast(world: World) -> None:
    world.kernel.cost = lambda way, nbytes: 0.0
    measure(world.mechanisms, world.scratch)
    assert world.by(64, 256 * KIB) == "a kernel"


def test_what_is_slow_once_is_not_slow(world: World) -> None:
    """A kernel is compiled in its first call."""
    costs = iter([1.0])
    world.kernel.cost = lambda way, nbytes: next(costs, 1e-9)
    measure(world.mechanisms, world.scratch)
    assert world.by(64, 4 * KIB) == "a kernel"


def test_what_the_first_one_raises_is_the_callers(world: World) -> None:
    world.engine.raises = lambda runs: True
    with pytest.raises(OSError, match="does not work"):
        world.mechanisms.copy(world.runs(64, 4 * KIB))
    assert world.mechanisms.left == (world.engine, world.kernel)


def test_what_the_trial_cannot_do_counts_against_nobody(world: World) -> None:
    def broken(work: Callable[[], None]) -> float:
        raise OSError("no event")

    world.scratch.seconds = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no event"):
        measure(world.mechanisms, world.scratch)
    assert world.mechanisms.left == (world.engine, world.kernel)
    assert world.by(64, 4 * KIB) == "the copy engine"


def addresses(*values: int) -> Integers:
    return np.array(values, dtype=np.int64)


def test_a_copy_has_a_way_where_every_run_of_one_side_is_pinned() -> None:
    pinned, ten = Pinned(), addresses(10, 10)
    assert pinned.runs(addresses(100, 110), addresses(0, 10), ten).way is None
    pinned.add(110, 10)
    assert pinned.runs(addresses(100, 110), addresses(0, 10), ten).way is None
    pinned.add(100, 10)  # side by side: one run may lie over both
    assert pinned.runs(addresses(100, 110), addresses(0, 10), ten).way == "store"
    assert pinned.runs(addresses(0, 10), addresses(105, 105), ten).way == "load"
    assert pinned.runs(addresses(0, 10), addresses(100, 111), ten).way is None
    assert pinned.runs(addresses(0, 10), addresses(99, 100), ten).way is None
    pinned.remove(100)
    assert pinned.runs(addresses(0, 10), addresses(105, 105), ten).way is None
    assert pinned.runs(addresses(0), addresses(110), ten[:1]).way == "load"
    assert pinned.runs(addresses(), addresses(), addresses()).way is None
