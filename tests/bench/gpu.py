"""Compares copies between a GPU and pinned slots with one contiguous copy.

Run `python tests/bench/gpu.py`: about one minute on one GPU, without vLLM and without a network. It
prints the copy backend that autotuning chose for each size of runs, and two tables.

The first table has floors, and the exit status is 1 if one is missed: the speed of copying 256 MiB
in pages of 64 KiB, as a share of one contiguous pinned copy, for each direction and for both at
once; and the speed of a matrix product during both, as a share of its speed alone. "queued" is the
same share if the device is busy when the copies are queued, so without the time of the calls.
"calls" are the milliseconds of the engine's thread.

The second table has the shares of each backend for pages of 4 KiB to 2 MiB, the size of a whole
block if blocks are outermost. All values are medians of interleaved rounds by CUDA's clock.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvcache.connectors.transfer.autotune import (
    FULL_TRIAL,
    RUN_COUNTS,
    RUN_SIZES,
    CopyBackend,
    TrialSize,
)
from kvcache.connectors.transfer.copy_batch import DIRECTIONS

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Workload:
    """How much is copied, how often, and beside what."""

    nbytes: int = 256 * MIB
    block: int = 2 * MIB
    page: int = 64 * KIB  # of the first table
    pages: tuple[int, ...] = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 2 * MIB)  # of the second
    rounds: int = 15
    factor: int = 8192  # rows and columns of the matrices
    products: int = 10
    busy_cycles: int = 20_000_000  # about 10 ms of other work
    trial: TrialSize = FULL_TRIAL


@dataclass(frozen=True)
class Times:
    """Seconds of the device, and of the thread that made the calls."""

    device: float
    calls: float


Row = tuple[Callable[[], Times], Callable[[], Times]]  # the measured work, and the one to compare
CALLS = ("load calls", "store calls")  # columns of the second table
FLOORS = {"load": 0.9, "store": 0.9, "both at once": 0.85, "product beside": 0.97}


class Rig:
    """Pages on the GPU, as many slots, and contiguous memory of the same size."""

    def __init__(self, workload: Workload, page: int) -> None:
        import torch

        from kvcache.connectors.layout.placement import BlockRun
        from kvcache.connectors.transfer.base import CopyGeometry
        from kvcache.connectors.transfer.cuda import CudaDevice
        from kvcache.connectors.transfer.device import DeviceCopier
        from kvcache.slab import Slab

        self.torch: Any = torch
        self.workload = workload
        device = torch.device("cuda", 0)
        layers, count = workload.block // page, workload.nbytes // workload.block
        blocks, flat = 4 * count, workload.nbytes
        # The copier has addresses only. Without this reference torch would reuse the memory.
        self.pages = torch.zeros((layers, blocks, page), dtype=torch.uint8, device=device)
        self.slab = Slab.create(2 * count, workload.block)
        geometry = CopyGeometry(
            [BlockRun(layer.data_ptr(), page, page, blocks) for layer in self.pages],
            slab_address=self.slab.address,
            slots=2 * count,
            slot_nbytes=self.slab.slot_nbytes,
        )
        self.cuda = CudaDevice(device, trial_size=workload.trial)
        self.copier = DeviceCopier(geometry, device=self.cuda)
        self.slab.populate(self.copier.pin_slots)
        self.slab.wait_populated()
        self.cuda.wait_for_trial()
        chosen = random.Random(0).sample(range(blocks), 2 * count)
        self.stored, self.loaded = chosen[:count], chosen[count:]
        self.low, self.high = list(range(count)), list(range(count, 2 * count))
        self.host = [torch.zeros(flat, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.flat = [torch.zeros(flat, dtype=torch.uint8, device=device) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]
        square = (workload.factor, workload.factor)
        self.factor = torch.randn(square, dtype=torch.bfloat16, device=device)

    def use(self, backend: CopyBackend) -> None:
        """Make `backend` copy runs of all sizes."""
        took = {**dict.fromkeys(self.cuda.selector.enabled, 1.0), backend: 0.01}
        keys = product(DIRECTIONS, RUN_COUNTS, RUN_SIZES)
        self.cuda.selector.choose(dict.fromkeys(keys, took))

    def copy_pages(self, *directions: str) -> None:
        if "store" in directions:
            self.copier.gather(self.stored, self.low)
        if "load" in directions:
            self.copier.scatter(self.high, self.loaded)
        self.copier.fence(self.stored)

    def copy_contiguous(self, *directions: str) -> None:
        cuda = self.torch.cuda
        for at, direction in enumerate(DIRECTIONS):
            if direction in directions:
                source, target = self.host[at], self.flat[at]
                if direction == "store":
                    source, target = target, source
                self.streams[at].wait_stream(cuda.current_stream())
                with cuda.stream(self.streams[at]):
                    target.copy_(source, non_blocking=True)
        for stream in self.streams:
            cuda.current_stream().wait_stream(stream)

    def multiply(self) -> None:
        for _ in range(self.workload.products):
            self.torch.mm(self.factor, self.factor)

    def multiply_beside_copies(self) -> Times:
        """Return the times of the product during copies in both directions."""
        self.copier.gather(self.stored, self.low)
        self.copier.scatter(self.high, self.loaded, awaited=False)
        return self.measure(self.multiply)

    def measure(self, work: Callable[[], None], *, busy: bool = False) -> Times:
        """Return the times of `work`; `busy`: queued behind other work of the device."""
        cuda = self.torch.cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        if busy:
            cuda._sleep(self.workload.busy_cycles)
        begin.record()
        called = time.perf_counter()
        work()
        calls = time.perf_counter() - called
        end.record()
        cuda.synchronize()
        return Times(float(begin.elapsed_time(end)) / 1e3, calls)

    def rows(self, *, busy: bool = False) -> dict[str, Row]:
        def both(*directions: str) -> Row:
            return (
                lambda: self.measure(lambda: self.copy_pages(*directions), busy=busy),
                lambda: self.measure(lambda: self.copy_contiguous(*directions), busy=busy),
            )

        copies = {"load": both("load"), "store": both("store"), "both at once": both(*DIRECTIONS)}
        if busy:
            return copies
        beside = self.multiply_beside_copies, lambda: self.measure(self.multiply)
        return {**copies, "product beside": beside}

    def close(self) -> None:
        self.torch.cuda.synchronize()
        self.copier.close()
        self.slab.close()


def measure_rows(
    rows: Mapping[Any, Row], rounds: int, before: Callable[[Any], None] = lambda _: None
) -> dict[Any, tuple[Times, Times]]:
    """Return for each row the median times of both works, from interleaved rounds."""
    took: dict[Any, tuple[list[Times], list[Times]]] = {name: ([], []) for name in rows}
    for turn in range(rounds + 2):  # two to warm up
        for name, pair in rows.items():
            before(name)
            for which in (0, 1) if turn % 2 else (1, 0):
                took[name][which].append(pair[which]())
    return {name: (_median(ours[2:]), _median(theirs[2:])) for name, (ours, theirs) in took.items()}


def _median(times: list[Times]) -> Times:
    return Times(median(each.device for each in times), median(each.calls for each in times))


def ratio(took: tuple[Times, Times]) -> float:
    """Return the speed of the first work as a share of that of the second."""
    return took[1].device / took[0].device


def print_floors(rig: Rig) -> int:
    """Print the first table; return the number of missed floors."""
    workload = rig.workload
    title = f"{workload.nbytes >> 20} MiB, {workload.page >> 10} KiB"
    names = ("ms", "GB/s", "ratio", "floor", "queued", "calls")
    print(f"\n{title:16}", *(f"{name:>8}" for name in names), sep="")
    took = measure_rows(rig.rows(), workload.rounds)
    queued = measure_rows(rig.rows(busy=True), workload.rounds)
    missed = 0
    for name, times in took.items():
        moved = 0 if "product" in name else workload.nbytes * (2 if "both" in name else 1)
        seconds = times[0].device
        missed += ratio(times) < FLOORS[name]
        rate = f"{moved / seconds / 1e9:.1f}" if moved else ""
        behind = f"{ratio(queued[name]):.2f}" if moved else ""
        calls = f"{times[0].calls * 1e3:.2f}" if moved else ""
        print(
            f"{name:16}{seconds * 1e3:8.2f}{rate:>8}{ratio(times):8.2f}{FLOORS[name]:8.2f}"
            f"{behind:>8}{calls:>8}"
        )
    return missed


def print_backends(rig: Rig, page: int) -> None:
    """Print the ratios of each backend for pages of this size."""
    by_name = {backend.name: backend for backend in rig.cuda.selector.enabled}
    rows = {(by, name): row for by in by_name for name, row in rig.rows().items()}
    rounds = -(-rig.workload.rounds // 3)
    took = measure_rows(rows, rounds, before=lambda key: rig.use(by_name[key[0]]))
    for by in by_name:
        ratios = (f"{ratio(took[by, name]):15.2f}" for name in FLOORS)
        calls = (took[by, name][0].calls * 1e3 for name in ("load", "store"))
        print(f"{page >> 10:4} KiB by {by:13}", *ratios, *(f"{each:12.2f}" for each in calls))


def main(workload: Workload = Workload()) -> int:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device; nothing to measure")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    began = time.perf_counter()
    print(torch.cuda.get_device_name(0))
    rig = Rig(workload, workload.page)  # logs the result of autotuning
    try:
        missed = print_floors(rig)
    finally:
        rig.close()
    logging.disable(logging.INFO)
    title = f"{workload.nbytes >> 20} MiB, ratios"
    columns = (*(f"{name:>15}" for name in FLOORS), *(f"{name:>12}" for name in CALLS))
    print(f"\n{title:25}", *columns)
    for page in workload.pages:
        rig = Rig(workload, page)
        try:
            print_backends(rig, page)
        finally:
            rig.close()
    logging.disable(logging.NOTSET)
    print(f"\n{missed} floors missed; {time.perf_counter() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
