"""Compares copies between a GPU and pinned slots with one contiguous copy.

Run `python tests/bench/gpu.py`. It prints the copy backend that autotuning chose for each size of
runs, and two tables. The first has floors: the speed of copying 256 MiB in pages of 64 KiB, as a
share of one contiguous pinned copy, for each direction and for both at once; and the speed of a
matrix product during both, as a share of its speed alone. The second has the same ratios for each
backend and several page sizes. All are medians of interleaved rounds by CUDA's clock.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PAGE, LAYERS, NBYTES, ROUNDS = 64 << 10, 32, 256 << 20, 15
PAGES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
Row = tuple[
    Callable[[], float], Callable[[], float]
]  # the measured work, and the work to compare with
FLOORS = {"load": 0.9, "store": 0.9, "both at once": 0.85, "product beside": 0.97}


class Rig:
    """Pages on the GPU, as many slots, and contiguous memory of the same size."""

    def __init__(self, torch: Any, page: int) -> None:
        from kvcache.connectors.layout.placement import BlockRun
        from kvcache.connectors.transfer.base import CopyGeometry
        from kvcache.connectors.transfer.cuda import CudaDevice
        from kvcache.connectors.transfer.device import DeviceCopier
        from kvcache.slab import Slab

        self.torch = torch
        device = torch.device("cuda", 0)
        count = NBYTES // (page * LAYERS)
        # The copier has addresses only. Without a reference torch would free this memory.
        self.pages = torch.zeros((LAYERS, 4 * count, page), dtype=torch.uint8, device=device)
        self.slab = Slab.create(2 * count, LAYERS * page)
        sides = CopyGeometry(
            [BlockRun(layer.data_ptr(), page, page, 4 * count) for layer in self.pages],
            slab_address=self.slab.address,
            slots=2 * count,
            slot_nbytes=self.slab.slot_nbytes,
        )
        self.cuda = CudaDevice(device)
        self.copier = DeviceCopier(sides, device=self.cuda)
        self.slab.populate(self.copier.pin_slots)
        self.slab.wait_populated()
        self.cuda.wait_for_trial()
        blocks = random.Random(0).sample(range(4 * count), 2 * count)
        self.stored, self.loaded = blocks[:count], blocks[count:]
        self.low, self.high = list(range(count)), list(range(count, 2 * count))
        self.host = [torch.zeros(NBYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.flat = [torch.zeros(NBYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]
        self.factor = torch.randn((8192, 8192), dtype=torch.bfloat16, device=device)

    def use(self, backend: Any) -> None:
        """Make `backend` copy runs of all sizes."""
        from kvcache.connectors.transfer.autotune import DIRECTIONS, RUN_COUNTS, RUN_SIZES

        took = {**dict.fromkeys(self.cuda.selector.enabled, 1.0), backend: 0.01}
        self.cuda.selector.choose(dict.fromkeys(product(DIRECTIONS, RUN_COUNTS, RUN_SIZES), took))

    def paged(self, *ways: str) -> None:
        if "store" in ways:
            self.copier.gather(self.stored, self.low)
        if "load" in ways:
            self.copier.scatter(self.high, self.loaded)
        self.copier.fence(self.stored)

    def contiguous(self, *ways: str) -> None:
        cuda = self.torch.cuda
        for at, direction in enumerate(("load", "store")):
            if direction in ways:
                source, target = self.host[at], self.flat[at]
                if direction == "store":
                    source, target = target, source
                self.streams[at].wait_stream(cuda.current_stream())
                with cuda.stream(self.streams[at]):
                    target.copy_(source, non_blocking=True)
        for stream in self.streams:
            cuda.current_stream().wait_stream(stream)

    def product(self) -> None:
        for _ in range(10):
            self.torch.mm(self.factor, self.factor)

    def product_beside(self) -> float:
        """Return the seconds of the product during copies in both directions."""
        self.copier.gather(self.stored, self.low)
        self.copier.scatter(self.high, self.loaded, awaited=False)
        return self.seconds(self.product)

    def seconds(self, work: Callable[[], None]) -> float:
        cuda = self.torch.cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def rows(self) -> dict[str, Row]:
        def both(*ways: str) -> Row:
            return (
                lambda: self.seconds(lambda: self.paged(*ways)),
                lambda: self.seconds(lambda: self.contiguous(*ways)),
            )

        return {
            "load": both("load"),
            "store": both("store"),
            "both at once": both("load", "store"),
            "product beside": (self.product_beside, lambda: self.seconds(self.product)),
        }

    def close(self) -> None:
        self.copier.close()
        self.slab.close()


def measure(
    rows: Mapping[Any, Row], rounds: int, before: Callable[[Any], None] = lambda _: None
) -> dict[Any, tuple[float, float]]:
    """Return for each row the median seconds of both works, from interleaved rounds."""
    took: dict[Any, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
    for turn in range(rounds + 2):  # two to warm up
        for name, pair in rows.items():
            before(name)
            for which in (0, 1) if turn % 2 else (1, 0):
                took[name][which].append(pair[which]())
    return {name: (median(ours[2:]), median(theirs[2:])) for name, (ours, theirs) in took.items()}


def print_floors(rig: Rig) -> int:
    """Print the first table; return the number of missed floors."""
    print(f"\n{'256 MiB, 64 KiB':16}{'ms':>8}{'GB/s':>8}{'ratio':>8}{'floor':>8}")
    missed = 0
    for name, (ours, theirs) in measure(rig.rows(), ROUNDS).items():
        moved = 0 if "product" in name else NBYTES * (2 if "both" in name else 1)
        missed += theirs / ours < FLOORS[name]
        rate = f"{moved / ours / 1e9:.1f}" if moved else ""
        print(f"{name:16}{ours * 1e3:8.2f}{rate:>8}{theirs / ours:8.2f}{FLOORS[name]:8.2f}")
    return missed


def print_backends(rig: Rig, page: int) -> None:
    """Print the ratios of each backend for pages of this size."""
    by_name = {backend.name: backend for backend in rig.cuda.selector.enabled}
    rows = {(by, name): row for by in by_name for name, row in rig.rows().items()}
    took = measure(rows, ROUNDS // 3, before=lambda key: rig.use(by_name[key[0]]))
    for by in by_name:
        ratios = (took[by, name][1] / took[by, name][0] for name in FLOORS)
        print(f"{page >> 10:4} KiB by {by:22}", *(f"{ratio:15.2f}" for ratio in ratios))


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device; nothing to measure")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"{torch.cuda.get_device_name(0)}, {LAYERS} layers")
    rig = Rig(torch, PAGE)  # logs the result of autotuning
    missed = print_floors(rig)
    rig.close()
    logging.disable(logging.INFO)
    print(f"\n{'256 MiB, ratios':34}", *(f"{name:>15}" for name in FLOORS))
    for page in PAGES:
        rig = Rig(torch, page)
        print_backends(rig, page)
        rig.close()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
