"""Copies between a GPU and pinned slots, beside one contiguous copy: `python tests/bench/gpu.py`.

One table: what 256 MiB in pages of 64 KiB reach of one contiguous pinned copy in each direction, of
both directions at once, and what a matrix product loses while both go on. Medians of rounds taken
in turns, by CUDA's own clock.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PAGE, LAYERS, NBYTES, ROUNDS = 64 << 10, 32, 256 << 20, 15
FLOORS = {"load": 0.9, "store": 0.9, "both at once": 0.85, "product beside": 0.97}


class Rig:
    """Pages on the GPU and as many slots, ours; and flat memory of the same size, for the floor."""

    def __init__(self, torch: Any) -> None:
        from kvcache.connectors.copier import Sides
        from kvcache.connectors.cuda import Cuda
        from kvcache.connectors.device import DeviceCopier
        from kvcache.connectors.placement import Pages
        from kvcache.slab import Slab

        self.torch = torch
        device = torch.device("cuda", 0)
        count = NBYTES // (PAGE * LAYERS)
        pages = torch.zeros((LAYERS, 4 * count, PAGE), dtype=torch.uint8, device=device)
        self.slab = Slab.create(2 * count, LAYERS * PAGE)
        sides = Sides(
            [Pages(layer.data_ptr(), PAGE, PAGE, 4 * count) for layer in pages],
            slab_address=self.slab.address,
            slots=2 * count,
            slot_nbytes=self.slab.slot_nbytes,
        )
        self.copier = DeviceCopier(sides, Cuda(device))
        self.slab.populate(self.copier.ready)
        self.slab.wait_populated()
        blocks = random.Random(0).sample(range(4 * count), 2 * count)
        self.stored, self.loaded = blocks[:count], blocks[count:]
        self.low, self.high = list(range(count)), list(range(count, 2 * count))
        self.host = [torch.zeros(NBYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.flat = [torch.zeros(NBYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]
        self.factor = torch.randn((8192, 8192), dtype=torch.bfloat16, device=device)

    def paged(self, *ways: str) -> None:
        if "store" in ways:
            self.copier.gather(self.stored, self.low)
        if "load" in ways:
            self.copier.scatter(self.high, self.loaded)
        self.copier.fence(self.stored)

    def contiguous(self, *ways: str) -> None:
        cuda = self.torch.cuda
        for at, way in enumerate(("load", "store")):
            if way in ways:
                source, target = self.host[at], self.flat[at]
                if way == "store":
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
        """Seconds of the product, while copies go on in both directions."""
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

    def rows(self) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
        """What is measured, and what it is held against."""

        def both(*ways: str) -> tuple[Callable[[], float], Callable[[], float]]:
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


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return 0
    rig = Rig(torch)
    took: dict[tuple[str, int], list[float]] = {}
    for turn in range(ROUNDS + 2):  # two to warm up
        for name, pair in rig.rows().items():
            for which in (0, 1) if turn % 2 else (1, 0):
                took.setdefault((name, which), []).append(pair[which]())
    print(f"{torch.cuda.get_device_name(0)}, 256 MiB in pages of 64 KiB, {LAYERS} layers")
    print(f"{'':16}{'ms':>8}{'GB/s':>8}{'ratio':>8}{'floor':>8}")
    missed = 0
    for name, floor in FLOORS.items():
        ours, theirs = (statistics.median(took[name, which][2:]) for which in (0, 1))
        moved = 0 if "product" in name else NBYTES * (2 if "both" in name else 1)
        missed += theirs / ours < floor
        rate = f"{moved / ours / 1e9:.1f}" if moved else ""
        print(f"{name:16}{ours * 1e3:8.2f}{rate:>8}{theirs / ours:8.2f}{floor:8.2f}")
    rig.close()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
