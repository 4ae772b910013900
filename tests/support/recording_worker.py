"""One rank's side of the connector, with a page copier that records its calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

pytest.importorskip("vllm")

import torch

from kvcache.connectors.transfer.base import CompletedCopy
from kvcache.connectors.transfer.streams import Device
from kvcache.connectors.vllm.messages import Piece, PieceOfRank, SlabShards, Step, Transfer
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.slab import SlabDescriptor
from tests.support.played_engine import cache_config, full_attention


class RecordingCopier:
    """Records its calls in place of a page copier; those with a number in `failing` raise."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.calls: list[tuple[str, list[int], list[int]]] = []
        self.awaited: list[bool] = []  # for each load
        self.announced: list[int] = []  # by the last load
        self.waits: list[int | None] = []

    def gather(
        self,
        blocks: Sequence[int],
        slots: Sequence[int],
        geometries: Sequence[tuple[int, int]] = (),
    ) -> CompletedCopy:
        assert self.waits[-1] is None, "stored before all loads are there"
        assert geometries == [(0, len(blocks))]
        return self._call("gather", blocks, slots)

    def scatter(
        self,
        slots: Sequence[int],
        blocks: Sequence[int],
        geometries: Sequence[tuple[int, int]] = (),
        *,
        awaited: bool = True,
        announced: Collection[int] = (),
    ) -> CompletedCopy:
        assert geometries == [(0, len(blocks))]
        self.awaited.append(awaited)
        self.announced = sorted(announced)
        return self._call("scatter", slots, blocks)

    def wait_for_layer(self, layer: int | None = None) -> None:
        self.waits.append(layer)

    def fence(self, blocks: Sequence[int]) -> None:
        self.calls.append(("fence", list(blocks), []))

    def close(self) -> None:
        pass

    def _call(self, name: str, sources: Sequence[int], targets: Sequence[int]) -> CompletedCopy:
        self.calls.append((name, list(sources), list(targets)))
        if len(self.calls) - 1 in self.failing:
            raise OSError("fails")
        return CompletedCopy(1.0)


def one_piece(
    slab: SlabDescriptor, nbytes: int, *, offset: int = 0, rank: tuple[int, int] = (0, 0)
) -> SlabShards:
    """Return the memory of one group, with a piece of so many bytes of one rank."""
    piece = Piece(0, 0, 0, {rank: PieceOfRank(0, nbytes, offset)})
    return SlabShards(slab, (piece,))


NOWHERE = one_piece(SlabDescriptor("/proc/self/fd/99999", "kvcache-gone", 8, 4096), 4096)


def step(memory: SlabShards = NOWHERE, number: int = 0) -> Step:
    return Step(
        memory,
        loads=[Transfer(1, [10, 11], [0, 1]), Transfer(2, [12], [2])],
        stores=[Transfer(3, [13], [3]), Transfer(4, [14, 15], [4, 5])],
        number=number,
    )


def side(
    copier: RecordingCopier | None = None,
    *,
    layers: Sequence[str] = ("one", "two"),
    rank: tuple[int, int] = (0, 0),
    page_shape: tuple[int, ...] = (2, 32, 8),
    device: Device | None = None,
    defers_stores: bool = False,
) -> WorkerSide:
    """Return a worker's side of 16 blocks; with ``copier``, its float32 caches are registered."""
    config = cache_config(full_attention(), layers=layers)
    config.num_blocks = 16
    worker = WorkerSide(
        config,
        rank,
        1,
        device=device,
        copier=copier,  # type: ignore[arg-type]
        defers_stores=defers_stores,
    )
    if copier is not None:
        worker.register({name: torch.zeros(16, *page_shape) for name in layers})
    return worker
