"""The choice of a copy backend: the fastest correct one is used, and an incorrect one never."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

pytest.importorskip("numpy")

import numpy as np

from kvcache.connectors.transfer.autotune import (
    MIN_RUNS,
    RUN_COUNTS,
    RUN_SIZES,
    BackendSelector,
    ByteArray,
    run_trial,
)
from kvcache.connectors.transfer.copy_batch import CopyBatch, Direction, PinnedRanges

KIB = 1024


@dataclass
class Clock:
    seconds: float = 0.0


@dataclass(eq=False)
class FakeBackend:
    """Copies at once and advances the clock by `cost` for each run. It can be made to fail."""

    name: str
    clock: Clock
    cost: Callable[[Direction | None, int], float]  # seconds of a run, by direction and bytes
    alignment: int = 1  # supports sizes that are multiples of this
    pinned: bool = True  # supports only pinned memory
    corrupts: Callable[[CopyBatch], bool] = lambda batch: False
    raises: Callable[[CopyBatch], bool] = lambda batch: False
    calls: list[CopyBatch] = field(default_factory=list)

    def supports(self, batch: CopyBatch) -> bool:
        if self.pinned and batch.direction is None:
            return False
        return not (batch.nbytes % self.alignment).any()

    def copy(self, batch: CopyBatch) -> None:
        self.calls.append(batch)
        if self.raises(batch):
            raise OSError("it does not work here")
        for target, source, nbytes in zip(batch.targets, batch.sources, batch.nbytes, strict=True):
            self.clock.seconds += self.cost(batch.direction, int(nbytes))
            ctypes.memmove(int(target), int(source), int(nbytes))
        if self.corrupts(batch):
            ctypes.memset(int(batch.targets[-1] + batch.nbytes[-1] - 1), 0x5A, 1)


class ProcessMemory:
    """Memory of this process, as the memory of one side."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.zeros(nbytes, dtype=np.uint8)
        self.address = self.bytes.ctypes.data

    def write(self, data: ByteArray) -> None:
        self.bytes[: data.nbytes] = data

    def clear(self, nbytes: int) -> None:
        self.bytes[:nbytes] = 0

    def read(self, nbytes: int) -> ByteArray:
        return self.bytes[:nbytes]


class ProcessScratch:
    """The memory of a trial, with the host's side pinned, timed by the clock of the backends."""

    nbytes = 4 << 20

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.host, self.device = ProcessMemory(self.nbytes), ProcessMemory(self.nbytes)
        pinned = PinnedRanges()
        pinned.add(self.host.address, self.nbytes)
        self.batch = pinned.batch

    def seconds(self, work: Callable[[], None]) -> float:
        begin = self.clock.seconds
        work()
        return self.clock.seconds - begin


class TwoBackends:
    """A copy engine, which takes 2 us per run, and a kernel, which takes longer per byte."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.engine = FakeBackend("engine", self.clock, self.engine_cost, pinned=False)
        self.kernel = FakeBackend("kernel", self.clock, self.kernel_cost, alignment=16)
        self.selector = BackendSelector([self.engine, self.kernel])
        self.scratch = ProcessScratch(self.clock)

    def engine_cost(self, direction: Direction | None, nbytes: int) -> float:
        return 2e-6 + nbytes / 50e9

    def kernel_cost(self, direction: Direction | None, nbytes: int) -> float:
        return 0.1e-6 + nbytes / (30e9 if direction == "load" else 5e9)

    def measure(self) -> None:
        run_trial(self.selector, self.scratch)

    def batch(self, count: int, nbytes: int, direction: Direction | None = "load") -> CopyBatch:
        """Runs from `memory[1]` to `memory[0]`, which are zeros."""
        self.memory = np.zeros((2, count, nbytes), dtype=np.uint8)
        at = np.arange(count, dtype=np.int64) * nbytes + self.memory.ctypes.data
        sizes = np.full(count, nbytes, dtype=np.int64)
        return CopyBatch(at, at + count * nbytes, sizes, direction)

    def chosen(self, count: int, nbytes: int, direction: Direction | None = "load") -> str:
        """Copy `count` runs of `nbytes` bytes and return the name of the backend that did."""
        before = {each: len(each.calls) for each in (self.engine, self.kernel)}
        self.selector.copy(self.batch(count, nbytes, direction))
        [name] = [each.name for each, calls in before.items() if len(each.calls) > calls]
        return name


@pytest.fixture
def backends() -> TwoBackends:
    return TwoBackends()


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_selector_before_the_trial_uses_the_default(backends: TwoBackends) -> None:
    assert backends.chosen(64, 4 * KIB) == "engine"


def test_selector_uses_the_fastest_backend_where_the_speedup_is_large(
    backends: TwoBackends, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        backends.measure()
    # The kernel is 1.2 times as fast for loads up to about 74 KB, and for stores up to 10 KB.
    assert [backends.chosen(MIN_RUNS, size) for size in RUN_SIZES] == [
        *["kernel"] * 5, *["engine"] * 2
    ]  # fmt: skip
    assert [backends.chosen(MIN_RUNS, size, "store") for size in RUN_SIZES[:3]] == [
        *["kernel"] * 2, "engine"
    ]  # fmt: skip
    assert messages(caplog, logging.INFO) == [
        (
            "kvcache: copy backends chosen: loads: kernel for runs up to 64 KiB"
            " (1.4 to 8.8 times as fast), engine for larger runs; stores: kernel for runs up to"
            " 8 KiB (1.2 to 2.3 times as fast), engine for larger runs"
        )
    ]


def test_selector_for_unmeasured_copies_uses_the_default(backends: TwoBackends) -> None:
    backends.measure()
    assert backends.chosen(MIN_RUNS, 4 * KIB) == "kernel"
    assert backends.chosen(MIN_RUNS - 1, 4 * KIB) == "engine"  # too few runs
    assert backends.chosen(MIN_RUNS, 4 * KIB, None) == "engine"  # not pinned
    assert backends.chosen(MIN_RUNS, 4 * KIB + 8) == "engine"  # the kernel does not support it
    assert backends.chosen(MIN_RUNS, 64 * KIB + 16) == "engine"  # as the next larger measured size
    assert backends.chosen(MIN_RUNS, 512 * KIB) == "engine"  # larger than all measured sizes
    backends.selector.copy(backends.batch(0, 16))  # an empty copy raises nothing


def test_selector_lists_the_backends_that_copied_outside_trials(backends: TwoBackends) -> None:
    backends.measure()
    assert backends.selector.used == set()
    assert backends.chosen(MIN_RUNS - 1, 4 * KIB) == "engine"
    assert backends.selector.used == {"engine"}


def test_selector_for_mixed_sizes_uses_their_mean(backends: TwoBackends) -> None:
    backends.measure()
    batch = backends.batch(2 * MIN_RUNS, 112 * KIB)
    batch.nbytes[::2] = 16
    before = len(backends.kernel.calls)
    backends.selector.copy(batch)
    assert len(backends.kernel.calls) == before + 1
    batch.nbytes[::2] = 17 * KIB
    backends.selector.copy(batch)
    assert len(backends.kernel.calls) == before + 1


@pytest.mark.parametrize("direction", ["load", "store"])
@pytest.mark.parametrize("size", [4 * KIB, 256 * KIB])
def test_trial_with_one_wrong_byte_disables_the_backend(
    backends: TwoBackends, direction: Direction, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    backends.kernel.corrupts = lambda batch: (
        batch.direction == direction and int(batch.nbytes[0]) == size
    )
    with caplog.at_level(logging.INFO):
        backends.measure()
    assert messages(caplog, logging.INFO) == [
        "kvcache: copy backends chosen: loads: engine; stores: engine"
    ]
    count = min(MIN_RUNS, backends.scratch.nbytes // size // 2)
    assert messages(caplog, logging.WARNING) == [
        (
            "kvcache: copy backend kernel disabled (1 wrong bytes in a trial"
            f" {direction} of {count} runs of {size} bytes); other backends copy"
        )
    ]
    assert backends.chosen(64, 4 * KIB) == backends.chosen(64, 4 * KIB, "store") == "engine"


def test_trial_with_a_write_outside_the_runs_disables_the_backend(backends: TwoBackends) -> None:
    copy = backends.kernel.copy

    def copy_too_much(batch: CopyBatch) -> None:
        copy(batch)
        last = int(batch.targets.max() + batch.nbytes[0])
        outside = last if last < memory_end(batch) else int(batch.targets.min() - 1)
        ctypes.memset(outside, 0x5A, 1)

    def memory_end(batch: CopyBatch) -> int:
        side = backends.scratch.device if batch.direction == "load" else backends.scratch.host
        return side.address + backends.scratch.nbytes

    backends.kernel.copy = copy_too_much  # type: ignore[method-assign]
    backends.measure()
    assert backends.selector.enabled == (backends.engine,)


def test_trial_with_a_backend_that_copies_nothing_disables_it(backends: TwoBackends) -> None:
    backends.kernel.copy = lambda batch: None  # type: ignore[method-assign]
    backends.measure()
    assert backends.selector.enabled == (backends.engine,)


def test_trial_with_a_backend_that_raises_disables_it(
    backends: TwoBackends, caplog: pytest.LogCaptureFixture
) -> None:
    backends.kernel.raises = lambda batch: True
    backends.measure()
    assert messages(caplog, logging.WARNING) == [
        (
            "kvcache: copy backend kernel disabled (OSError: it does not work here);"
            " other backends copy"
        )
    ]
    assert backends.chosen(64, 4 * KIB) == "engine"


def test_trial_with_a_wrong_default_makes_the_next_backend_the_default(
    backends: TwoBackends,
) -> None:
    backends.engine.corrupts = lambda batch: True
    backends.measure()
    assert backends.chosen(64, 256 * KIB) == "kernel"


def test_copy_with_all_backends_disabled_raises(backends: TwoBackends) -> None:
    backends.engine.corrupts = backends.kernel.corrupts = lambda batch: True
    backends.measure()
    with pytest.raises(RuntimeError, match="no copy backend works for these pages"):
        backends.selector.copy(backends.batch(64, 4 * KIB))


def test_copy_with_a_backend_that_raises_is_repeated_by_the_default(
    backends: TwoBackends, caplog: pytest.LogCaptureFixture
) -> None:
    backends.measure()
    backends.kernel.raises = lambda batch: True
    batch = backends.batch(64, 4 * KIB)
    backends.memory[1] = 7
    for _ in range(2):
        backends.memory[0] = 0
        calls = len(backends.kernel.calls), len(backends.engine.calls)
        backends.selector.copy(batch)
        assert (backends.memory[0] == 7).all()
    assert (len(backends.kernel.calls), len(backends.engine.calls)) == (calls[0], calls[1] + 1)
    assert len(messages(caplog, logging.WARNING)) == 1


def test_disable_twice_logs_once(backends: TwoBackends, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        backends.selector.disable(backends.kernel, "in the trial and in a copy at once")
    assert len(messages(caplog, logging.WARNING)) == 1


def test_selector_uses_for_few_runs_what_was_fastest_with_few(
    backends: TwoBackends, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel takes longer to start than a copy engine, and less for each run."""
    copy = backends.kernel.copy

    def start_and_copy(batch: CopyBatch) -> None:
        backends.clock.seconds += 100e-6
        copy(batch)

    backends.kernel.copy = start_and_copy  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO):
        backends.measure()
    few, many = RUN_COUNTS
    assert backends.chosen(few, 4 * KIB) == backends.chosen(many - 1, 4 * KIB) == "engine"
    assert backends.chosen(many, 4 * KIB) == "kernel"
    [chosen] = messages(caplog, logging.INFO)
    assert "chosen: loads of 32 or more runs: engine; loads of 512 or more runs: kernel" in chosen


def test_selector_without_the_default_for_pinned_memory_uses_another_there(
    backends: TwoBackends,
) -> None:
    backends.selector = BackendSelector([backends.kernel, backends.engine])
    assert backends.chosen(2, 4 * KIB) == "kernel"
    assert backends.chosen(2, 4 * KIB, None) == "engine"
    backends.kernel.raises = lambda batch: True
    with pytest.raises(OSError, match="does not work"):
        backends.selector.copy(backends.batch(2, 4 * KIB))
    assert backends.selector.enabled == (backends.kernel, backends.engine)


def test_trial_with_zero_seconds_chooses_that_backend(backends: TwoBackends) -> None:
    backends.kernel.cost = lambda direction, nbytes: 0.0
    backends.measure()
    assert backends.chosen(64, 256 * KIB) == "kernel"


def test_trial_with_one_slow_round_ignores_it(backends: TwoBackends) -> None:
    """The first call of a kernel compiles it."""
    costs = iter([1.0])
    backends.kernel.cost = lambda direction, nbytes: next(costs, 1e-9)
    backends.measure()
    assert backends.chosen(64, 4 * KIB) == "kernel"


def test_copy_with_a_default_that_raises_raises_and_disables_nothing(backends: TwoBackends) -> None:
    backends.engine.raises = lambda batch: True
    with pytest.raises(OSError, match="does not work"):
        backends.selector.copy(backends.batch(64, 4 * KIB))
    assert backends.selector.enabled == (backends.engine, backends.kernel)


def test_trial_that_fails_itself_raises_and_disables_nothing(backends: TwoBackends) -> None:
    def broken(work: Callable[[], None]) -> float:
        raise OSError("no event")

    backends.scratch.seconds = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no event"):
        backends.measure()
    assert backends.selector.enabled == (backends.engine, backends.kernel)
    assert backends.chosen(64, 4 * KIB) == "engine"
