"""Merged runs copy the same bytes as the runs that they replace."""

from __future__ import annotations

import pytest

pytest.importorskip("numpy")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer.base import CopyGeometry, integers
from kvcache.connectors.transfer.merged_runs import MergedRuns

BLOCKS, SLOTS = 4, 3


@st.composite
def geometries(draw: st.DrawFn) -> CopyGeometry:
    """Draw runs with and without gaps and with one or several strides, in any order of memory."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    strides = draw(st.sampled_from([[64], [64, 80]]))
    address, shard_offset, runs, offsets = 1000, 0, [], []
    for number, nbytes in enumerate(sizes):
        address += draw(st.sampled_from([0, 0, 3, 512]))
        shard_offset += draw(st.sampled_from([0, 0, 2]))
        stride = draw(st.sampled_from(strides))
        runs.append(BlockRun(address, nbytes, stride, BLOCKS, draw(st.integers(0, number))))
        offsets.append(shard_offset)
        address += nbytes
        shard_offset += nbytes
    order = draw(st.permutations(range(len(runs)))) if draw(st.booleans()) else range(len(runs))
    return CopyGeometry(
        [runs[at] for at in order],
        [offsets[at] for at in order],
        slab_address=5000,
        slots=SLOTS,
        slot_nbytes=128,
    )


def copied_bytes(engine: list[int], slab: list[int], nbytes: list[int]) -> list[tuple[int, int]]:
    """Return the addresses of every copied byte, in the engine and in the slab."""
    return sorted(
        (at + byte, to + byte)
        for at, to, count in zip(engine, slab, nbytes, strict=True)
        for byte in range(count)
    )


@given(geometries(), st.data())
def test_merged_runs_of_any_layers_copy_the_bytes_of_the_runs(
    geometry: CopyGeometry, data: st.DataObject
) -> None:
    all_layers = sorted(set(geometry.layers.tolist()))
    layers = data.draw(st.none() | st.sets(st.sampled_from(all_layers)))
    blocks = data.draw(st.lists(st.integers(0, BLOCKS - 1), max_size=3))
    slots = [data.draw(st.integers(0, SLOTS - 1)) for _ in blocks]
    merged = MergedRuns(geometry, layers)
    columns = np.zeros((3, len(blocks) * len(merged)), dtype=np.int64)
    merged.write_rows(integers(blocks), integers(slots), *columns)
    runs = [
        run
        for run in range(len(geometry.nbytes))
        if layers is None or geometry.layers[run] in layers
    ]
    (engine, strides), (slab, slot_strides) = geometry.engine, geometry.slab
    expected = copied_bytes(
        [int(engine[run] + block * strides[run]) for block in blocks for run in runs],
        [int(slab[run] + slot * slot_strides[run]) for slot in slots for run in runs],
        [int(geometry.nbytes[run]) for _ in blocks for run in runs],
    )
    assert copied_bytes(*columns.tolist()) == expected


def test_adjacent_runs_are_one_run() -> None:
    """With blocks outermost, all layers of a block lie together."""
    geometry = CopyGeometry(
        [BlockRun(64 * layer, 64, 32 * 64, BLOCKS, layer) for layer in range(32)],
        slab_address=1 << 20,
        slots=SLOTS,
        slot_nbytes=32 * 64,
    )
    assert MergedRuns(geometry).nbytes.tolist() == [32 * 64]
    assert MergedRuns(geometry, range(4, 8)).nbytes.tolist() == [4 * 64]
    assert MergedRuns(geometry, [4, 6, 7]).nbytes.tolist() == [64, 2 * 64]
    assert len(MergedRuns(geometry, [])) == 0
