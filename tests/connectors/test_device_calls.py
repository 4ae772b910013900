"""How many calls and runs a device copies with: layer by layer, or adjacent layers together."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numpy")

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.device import DeviceCopier
from tests.support.reordering_device import ReorderingDevice


class CountingDevice(ReorderingDevice):
    """Copies nothing, and keeps the byte counts of the runs of each call."""

    def __init__(self) -> None:
        super().__init__(Random(0))
        self.calls: list[list[int]] = []

    def new_stream(self, *, background: bool = False) -> Any:
        return SimpleNamespace(
            record=ReorderingDevice(Random(0)).new_stream().record,
            wait_for=lambda event: None,
            copy=lambda targets, sources, nbytes: self.calls.append(nbytes.tolist()),
        )


@pytest.mark.parametrize(
    ("layers_mib", "blocks", "announced", "calls_mib"),
    [
        ([4] * 8, 1, range(8), [8, 8, 8, 8]),
        ([4] * 8, 1, (), [32]),
        ([4] * 7, 1, range(8), [8, 8, 8, 4]),
        ([4] * 8, 1, range(1, 8), [8, 8, 8, 8]),
        ([4] * 8, 1, range(4, 8), [16, 8, 8]),
        ([3] * 8, 1, range(8), [9, 9, 6]),
        ([4, 20, 1, 1, 1, 1], 1, range(6), [24, 4]),
        ([1] * 32, 32, range(32), [128] * 8),
        ([1] * 60, 32, range(60), [256] * 7 + [128]),
        ([0.0625] * 32, 2, range(32), [4]),
    ],
    ids=str,
)
def test_scatter_of_announced_layers_groups_them_into_large_calls(
    layers_mib: list[float], blocks: int, announced: range, calls_mib: list[float]
) -> None:
    for options in ({"announced": announced}, {"announced": announced, "awaited": False}, {}):
        geometry = CopyGeometry(
            [
                BlockRun(number, int(mib * 2**20) // 2, 2**30, blocks, number)
                for number, mib in enumerate(layers_mib)
                for _ in range(2)
            ],
            slab_address=0,
            slots=blocks,
            slot_nbytes=2**40,
        )
        device = CountingDevice()
        copier = DeviceCopier(geometry, device=device)
        copier.scatter(range(blocks), range(blocks), **options)
        assert [sum(call) / 2**20 for call in device.calls] == (
            calls_mib if len(options) == 1 else [sum(layers_mib) * blocks]
        )


LOADED_LAYERS = range(32)


@pytest.mark.parametrize(
    ("page_kib", "options", "runs_kib"),
    [
        (64, {"announced": LOADED_LAYERS}, [256] * 8),  # 8B: 2 MiB a block
        (64, {}, [2048]),
        (64, {"announced": LOADED_LAYERS, "awaited": False}, [2048]),
        (16, {"announced": LOADED_LAYERS}, [256, 256]),  # the same over four ranks
        (4, {"announced": LOADED_LAYERS}, [128]),
        (512, {"announced": LOADED_LAYERS}, [2048] * 8),
        (64, {"announced": range(16, 32)}, [1024, 256, 256, 256, 256]),
    ],
    ids=str,
)
def test_load_with_blocks_outermost_cuts_no_run_below_256_kib(
    page_kib: int, options: dict[str, Any], runs_kib: list[int]
) -> None:
    device = CountingDevice()
    blocks, page, layers = 128, page_kib << 10, len(LOADED_LAYERS)
    geometry = CopyGeometry(
        [BlockRun(1 + n * page, page, layers * page, blocks, n) for n in range(layers)],
        slab_address=0,
        slots=blocks,
        slot_nbytes=layers * page,
    )
    copier = DeviceCopier(geometry, device=device)
    copier.scatter(range(blocks), range(blocks), **options)
    assert device.calls == [[kib << 10] * blocks for kib in runs_kib]
    copier.gather(range(blocks), range(blocks))
    assert device.calls[-1] == [page * layers] * blocks
