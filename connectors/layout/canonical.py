"""The canonical order of a block's bytes, in which engines with different layouts share blocks.

A block in canonical order is a dense array ``[tokens, layers, kv, heads, dim]``, or
``[tokens, layers, latent]``: those of these axes that the layout has, the last one fastest. Copies
move elements and do not change them.

Invariant: in two caches with equal :func:`canonical_format_id`, every byte has the same meaning.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

from kvcache.connectors.layout.axes import LayoutError, sizes_of
from kvcache.connectors.layout.placement import MAX_RUNS, BlockRun, Placement, TensorPlacement

CACHE_LINE = 64
"""Bytes. Runs that are not a multiple of this are transposed where the copier can do so."""

MAX_TRANSPOSE_NBYTES = 32 << 10
"""The most bytes of a transposed run, so that source and result fit into a core's own caches."""

AXIS_ORDER = ("tokens", "layers", "kv", "heads", "dim", "latent")


def canonical_sizes(placement: Placement) -> dict[str, int]:
    """Return the sizes of the axes of a block in canonical order, the outermost first.

    Raises:
        LayoutError: when the canonical order does not have an axis, or when layers differ.
    """
    tensors = len(placement.layout.tensors)
    known = {"one", *AXIS_ORDER} - {"layers"} - ({"kv"} if tensors > 1 else set())
    first: dict[str, int] = {}
    for placed in placement.tensors:
        sizes = sizes_of(placed.axes)
        if (unknown := sizes.keys() - known) or tensors > 2:
            raise LayoutError(
                f"layout {placement.layout} has no canonical order: that needs one tensor in a"
                f" layer, or K and V, and no axes except {', '.join(sorted(known))}; this layout"
                f" has {tensors}, and {', '.join(sorted(unknown)) or 'no others'}"
            )
        sizes.pop("one", None)
        if tensors > 1:
            sizes["kv"] = tensors
        first = first or sizes
        if first != sizes or placed.tensor.dtype != placement.tensors[0].tensor.dtype:
            raise LayoutError(
                f"layers that differ have no canonical order: layer {placed.layer} has"
                f" {sizes} of {placed.tensor.dtype}, layer 0 {first} of"
                f" {placement.tensors[0].tensor.dtype}"
            )
    first["layers"] = placement.tensors[-1].layer + 1
    return {name: first[name] for name in AXIS_ORDER if name in first}


def canonical_format_id(placement: Placement) -> list[str]:
    """Return the meaning of the bytes of a block in canonical order, for any layout."""
    sizes = " ".join(f"{name}:{size}" for name, size in canonical_sizes(placement).items())
    return [f"canonical: {placement.tensors[0].tensor.dtype} {sizes}"]


class Transpose(NamedTuple):
    """A run that is a matrix of cells. A row in the engine is a column in the slot.

    Attributes:
        cell: bytes of a cell, contiguous on both sides.
        rows: the number of rows in the engine.
        columns: the number of columns in the engine.
        engine_row: bytes from one row to the next in the engine; the other steps alike.
    """

    cell: int
    rows: int
    columns: int
    engine_row: int
    engine_column: int
    slot_row: int
    slot_column: int


class _AxisSteps(NamedTuple):
    """An axis with its steps in the engine and in the slot, in bytes."""

    size: int
    engine: int
    slot: int


class CanonicalRuns(NamedTuple):
    """The runs in which a block is copied to and from canonical order.

    Attributes:
        runs: the runs in the engine. A transposed run is represented by its first cell.
        offsets: the offsets of the runs in a canonical block, in bytes.
        transposes: how each run is transposed; empty if runs are copied as is.
    """

    runs: list[BlockRun]
    offsets: list[int]
    transposes: list[Transpose]


def canonical_runs(placement: Placement, *, can_transpose: bool) -> CanonicalRuns:
    """Divide blocks into the runs by which they are copied to and from canonical order.

    Args:
        can_transpose: whether the copier can transpose runs. Runs are transposed if any would
            otherwise not be a multiple of a cache line, or if there would be too many.

    Raises:
        LayoutError: as :func:`canonical_sizes`; and when a block has too many runs.
    """
    sizes = canonical_sizes(placement)
    shapes = [_matched_axes(placed, sizes) for placed in placement.tensors]
    transposed = can_transpose and any(
        len(axes) > 1 and (cell % CACHE_LINE or _count_runs(axes) > MAX_RUNS)
        for _, cell, axes in shapes
    )
    result = CanonicalRuns([], [], [])
    for placed, (first, cell, all_axes) in zip(placement.tensors, shapes, strict=True):
        axes = all_axes
        if transposed:
            transpose, axes = _split_off_transpose(cell, all_axes)
            result.transposes.extend([transpose] * _count_runs(axes))
        if (count := _count_runs(axes)) > MAX_RUNS:
            raise LayoutError(
                f"layer {placed.layer} has no canonical order on {placement.device}: a block of it"
                f" has {count} runs of {cell} bytes; at most {MAX_RUNS} can be copied one by one"
            )
        stride = placed.block_axis.stride if placed.block_axis.size > 1 else cell
        for steps in product(*(range(axis.size) for axis in axes)):
            position = list(zip(steps, axes, strict=True))
            address = placed.tensor.data_ptr() + sum(step * axis.engine for step, axis in position)
            result.runs.append(
                BlockRun(address, cell, stride, placed.block_axis.size, placed.layer)
            )
            result.offsets.append(first + sum(step * axis.slot for step, axis in position))
    return result


def _matched_axes(
    placed: TensorPlacement, sizes: dict[str, int]
) -> tuple[int, int, list[_AxisSteps]]:
    """Match the axes of a tensor with those of a canonical block.

    Returns the offset of the tensor in the block, the bytes that are contiguous on both sides, and
    the other axes, the one with the smallest step in the block first. All in bytes.
    """
    step, nbytes = {}, placed.tensor.element_size()
    for name, size in reversed(sizes.items()):
        step[name], nbytes = nbytes, nbytes * size
    first = placed.layer * step["layers"] + (step["kv"] if placed.number else 0)
    matched = []
    for axis in reversed(placed.axes):
        if axis.size > 1:
            matched.append(_AxisSteps(axis.size, axis.stride, step[axis.name]))
            step[axis.name] *= axis.size  # for the next outer axis of the same name
    element = placed.tensor.element_size()
    axes = [_AxisSteps(1, element, element)]
    for size, engine, slot in sorted(matched, key=lambda axis: axis.slot):
        inner = axes[-1]
        if (engine, slot) == (inner.size * inner.engine, inner.size * inner.slot):
            axes[-1] = inner._replace(size=inner.size * size)
        else:
            axes.append(_AxisSteps(size, engine, slot))
    return first, axes[0].size * element, axes[1:]


def _split_off_transpose(cell: int, axes: list[_AxisSteps]) -> tuple[Transpose, list[_AxisSteps]]:
    """Return the matrix of two axes, and the axes outside it.

    The two are the axis with the smallest step in the slot, and of the others the one with the
    smallest step in the engine. They are divided until the matrix has at most MAX_TRANSPOSE_NBYTES.
    """
    rows, *others = axes or [_AxisSteps(1, cell, cell)]
    columns = min(others, key=lambda axis: axis.engine, default=_AxisSteps(1, cell, cell))
    outside = [axis for axis in others if axis is not columns]
    height, width = rows.size, columns.size
    while cell * height * width > MAX_TRANSPOSE_NBYTES and max(height, width) > 1:
        if height >= width:
            height = _largest_proper_divisor(height)
        else:
            width = _largest_proper_divisor(width)
    for axis, size in ((rows, height), (columns, width)):
        outside.append(_AxisSteps(axis.size // size, axis.engine * size, axis.slot * size))
    transpose = Transpose(cell, height, width, rows.engine, columns.engine, rows.slot, columns.slot)
    return transpose, outside


def _largest_proper_divisor(number: int) -> int:
    return max(divisor for divisor in range(1, number) if number % divisor == 0)


def _count_runs(axes: list[_AxisSteps]) -> int:
    return math.prod(axis.size for axis in axes)
