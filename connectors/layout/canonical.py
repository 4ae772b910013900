"""The canonical order of a block's bytes: what engines with different layouts can share.

A block in this order is one array of ``[tokens, layers, kv, heads, dim]``, or ``[tokens, layers,
latent]``: whatever a layout has of these names, dense, the last one fastest. Numbers stay as they
are, bit by bit; only where they lie is changed, element by element if need be.

Always true here: two caches whose canonical forms are equal mean the same by every byte.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

from kvcache.connectors.layout.axes import LayoutError, sizes_of
from kvcache.connectors.layout.placement import MOST_RUNS, BlockRun, Part, Placement

LINE = 64
"""Bytes: shorter runs, and those that end within a line, are turned where they can be."""

MOST_TURNED_NBYTES = 32 << 10
"""Of a run that is turned: with what it is made of, it stays in a core's own caches."""

ORDER = ("tokens", "layers", "kv", "heads", "dim", "latent")


def canonical_sizes(placement: Placement) -> dict[str, int]:
    """The axes of a block in canonical order, the outermost first.

    Raises:
        LayoutError: for axes without a meaning, and for layers that are not all alike.
    """
    tensors = len(placement.layout.tensors)
    known = {"one", *ORDER} - {"layers"} - ({"kv"} if tensors > 1 else set())
    found: dict[str, int] = {}
    for part in placement.parts:
        totals = sizes_of(part.axes)
        if (strange := totals.keys() - known) or tensors > 2:
            raise LayoutError(
                f"layout {placement.layout} has no canonical order: it takes one tensor of a layer,"
                f" or K and V, and no axes but {', '.join(sorted(known))}; this has {tensors},"
                f" and {', '.join(sorted(strange)) or 'no others'}"
            )
        totals.pop("one", None)
        if tensors > 1:
            totals["kv"] = tensors
        found = found or totals
        if found != totals or part.tensor.dtype != placement.parts[0].tensor.dtype:
            raise LayoutError(
                f"there is no canonical order of layers that differ: layer {part.layer} has"
                f" {totals} of {part.tensor.dtype}, layer 0 {found} of"
                f" {placement.parts[0].tensor.dtype}"
            )
    found["layers"] = placement.parts[-1].layer + 1
    return {name: found[name] for name in ORDER if name in found}


def canonical_form(placement: Placement) -> list[str]:
    """What the bytes of a block are in canonical order, whatever the engine's layout."""
    sizes = " ".join(f"{name}:{size}" for name, size in canonical_sizes(placement).items())
    return [f"canonical: {placement.parts[0].tensor.dtype} {sizes}"]


class Transpose(NamedTuple):
    """A run that is a matrix of cells on both sides: what is a row in the engine's is a column.

    Attributes:
        cell: bytes of a cell.
        engine_row: bytes from row to row in the engine, and so on.
    """

    cell: int
    rows: int
    columns: int
    engine_row: int
    engine_column: int
    slot_row: int
    slot_column: int


class _Axis(NamedTuple):
    """An axis on both sides: steps in bytes."""

    size: int
    engine: int
    slot: int


class CanonicalRuns(NamedTuple):
    """What a block is copied by into canonical order.

    Attributes:
        pages: where the runs lie in the engine; of those that are turned, the first cell.
        begins: where they begin in a canonical block, in bytes.
        turns: how each of them is turned; none, where none is.
    """

    pages: list[BlockRun]
    begins: list[int]
    turns: list[Transpose]


def canonical_runs(placement: Placement, *, turned: bool) -> CanonicalRuns:
    """How blocks come into canonical order.

    Args:
        turned: whether the copier turns runs. It does where they would be shorter than lines, or
            too many, if they are copied as they lie.

    Raises:
        LayoutError: as :func:`canonical_sizes`, and for too many runs.
    """
    sizes = canonical_sizes(placement)
    found = [_on_both_sides(part, sizes) for part in placement.parts]
    turned = turned and any(
        len(axes) > 1 and (cell % LINE or _count(axes) > MOST_RUNS) for _, cell, axes in found
    )
    runs = CanonicalRuns([], [], [])
    for part, (first, cell, inside) in zip(placement.parts, found, strict=True):
        axes = inside
        if turned:
            turn, axes = _turned(cell, inside)
            runs.turns.extend([turn] * _count(axes))
        if (count := _count(axes)) > MOST_RUNS:
            raise LayoutError(
                f"layer {part.layer} has no canonical order on {placement.device}: a block of it"
                f" lies in {count} runs of {cell} bytes; there may be {MOST_RUNS}, since each is"
                " copied by itself"
            )
        stride = part.blocks.stride if part.blocks.size > 1 else cell
        for steps in product(*(range(axis.size) for axis in axes)):
            at = list(zip(steps, axes, strict=True))
            address = part.tensor.data_ptr() + sum(step * axis.engine for step, axis in at)
            runs.pages.append(BlockRun(address, cell, stride, part.blocks.size, part.layer))
            runs.begins.append(first + sum(step * axis.slot for step, axis in at))
    return runs


def _on_both_sides(part: Part, sizes: dict[str, int]) -> tuple[int, int, list[_Axis]]:
    """Where a tensor begins in a canonical block, the bytes of it that lie together, and its axes.

    All in bytes; the axis first whose steps in a canonical block are the smallest.
    """
    step, nbytes = {}, part.tensor.element_size()
    for name, size in reversed(sizes.items()):
        step[name], nbytes = nbytes, nbytes * size
    first = part.layer * step["layers"] + (step["kv"] if part.number else 0)
    found = []
    for axis in reversed(part.axes):
        if axis.size > 1:
            found.append(_Axis(axis.size, axis.stride, step[axis.name]))
            step[axis.name] *= axis.size  # the part of the name that is outside this one
    element = part.tensor.element_size()
    axes = [_Axis(1, element, element)]
    for size, engine, slot in sorted(found, key=lambda axis: axis.slot):
        inner = axes[-1]
        if (engine, slot) == (inner.size * inner.engine, inner.size * inner.slot):
            axes[-1] = inner._replace(size=inner.size * size)
        else:
            axes.append(_Axis(size, engine, slot))
    return first, axes[0].size * element, axes[1:]


def _turned(cell: int, axes: list[_Axis]) -> tuple[Transpose, list[_Axis]]:
    """The matrix whose rows are as long as can be on both sides, and the axes of such ones."""
    rows, *others = axes or [_Axis(1, cell, cell)]
    columns = min(others, key=lambda axis: axis.engine, default=_Axis(1, cell, cell))
    rest = [axis for axis in others if axis is not columns]
    high, wide = rows.size, columns.size
    while cell * high * wide > MOST_TURNED_NBYTES and max(high, wide) > 1:
        high, wide = (_part(high), wide) if high >= wide else (high, _part(wide))
    for axis, size in ((rows, high), (columns, wide)):
        rest.append(_Axis(axis.size // size, axis.engine * size, axis.slot * size))
    return Transpose(cell, high, wide, rows.engine, columns.engine, rows.slot, columns.slot), rest


def _part(size: int) -> int:
    """The largest number that goes into a larger one without a remainder."""
    return max(part for part in range(1, size) if size % part == 0)


def _count(axes: list[_Axis]) -> int:
    return math.prod(axis.size for axis in axes)
