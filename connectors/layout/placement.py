"""Placement: where every block of an engine's cache lies, and in which order its bytes are copied.

Invariants:

* The runs of a block contain each of its bytes once, in the order of memory: layer by layer, tensor
  by tensor, then axis by axis with the widest stride first.
* ``format_id`` names the meaning of the bytes in that order. Caches with equal ``format_id`` can
  share blocks.
* No two elements of a tensor share an address. A tensor that does not prove this by its strides is
  refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from kvcache.connectors.layout.axes import (
    Axis,
    Layer,
    Layout,
    LayoutError,
    Tensor,
    axes_of,
    describe,
    find_layout,
    tensors_of,
)

MAX_RUNS = 4096
"""The most runs of bytes in which a block may lie in one tensor. More would be too short to be
copied one by one."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """A contiguous run of bytes that every block has.

    The run of block b is the `nbytes` bytes at `address + b * stride`, for 0 <= b < `count`.
    `stride` is in bytes; it is more than `nbytes` if other data lies between. `layer` is the number
    of the layer.
    """

    address: int
    nbytes: int
    stride: int
    count: int
    layer: int = 0

    def __post_init__(self) -> None:
        if self.nbytes < 1 or self.count < 1 or self.stride < self.nbytes:
            raise ValueError(f"{self}: nbytes and count must be at least 1, stride at least nbytes")


def cut_runs(runs: Sequence[BlockRun], begin: int, end: int) -> list[BlockRun]:
    """Return the runs of bytes ``begin`` to ``end`` of a block that consists of ``runs``."""
    cut, at = [], 0  # the first byte of the run in the block
    for run in runs:
        first, last = max(begin - at, 0), min(end - at, run.nbytes)
        if first < last:
            cut.append(replace(run, address=run.address + first, nbytes=last - first))
        at += run.nbytes
    return cut


@dataclass(frozen=True, slots=True)
class TensorPlacement:
    """One tensor of one layer.

    Attributes:
        layer: the number of the layer, from 0.
        number: the number of the tensor in its layer, from 0.
        block_axis: the axis of the blocks.
        axes: the other axes, in the order of the shape.
    """

    tensor: Tensor
    layer: int
    number: int
    block_axis: Axis
    axes: tuple[Axis, ...]

    @property
    def axes_by_stride(self) -> list[Axis]:
        """The axes with more than one step, the widest stride first."""
        axes = [axis for axis in self.axes if axis.size > 1]
        return sorted(axes, key=lambda axis: axis.stride, reverse=True)

    @property
    def format_id(self) -> str:
        """The meaning of the bytes of a block, in their order."""
        axes = " ".join(f"{axis.name}:{axis.size}" for axis in self.axes_by_stride)
        return f"{self.tensor.dtype} {axes}"

    def run_axes(self) -> tuple[list[Axis], int]:
        """Return the axes along which the runs are spread, and the bytes of a run."""
        outer, nbytes = self.axes_by_stride, self.tensor.element_size()
        while outer and outer[-1].stride == nbytes:
            nbytes *= outer.pop().size
        return outer, nbytes

    def runs(self) -> list[BlockRun]:
        """Return the runs of a block in this tensor, in the order of memory."""
        outer, nbytes = self.run_axes()
        steps = product(*(range(0, axis.size * axis.stride, axis.stride) for axis in outer))
        stride = self.block_axis.stride if self.block_axis.size > 1 else nbytes
        first = self.tensor.data_ptr()
        count = self.block_axis.size
        return [BlockRun(first + sum(step), nbytes, stride, count, self.layer) for step in steps]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a whole cache lies; made by :func:`place`. It keeps the tensors alive.

    Attributes:
        blocks: the number of blocks.
        device: the device of all tensors, such as ``cpu`` or ``cuda:0``.
        tensors: the tensors of all layers, layer by layer.
    """

    layout: Layout
    blocks: int
    device: str
    tensors: tuple[TensorPlacement, ...]

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, in all layers."""
        return sum(run.nbytes for run in self.runs())

    @property
    def element_nbytes(self) -> int:
        """Bytes of an element of the tensors; of the widest, if they differ."""
        return max(placed.tensor.element_size() for placed in self.tensors)

    @property
    def format_id(self) -> list[str]:
        """The meaning of the bytes of a block, in their order; a part of the namespace."""
        return [f"layer {placed.layer}: {placed.format_id}" for placed in self.tensors]

    def runs(self) -> list[BlockRun]:
        """Return the runs of a block, in the order that its bytes have in a slot."""
        return [run for placed in self.tensors for run in placed.runs()]


def place(
    layers: Sequence[Layer] | Mapping[str, Layer],
    layout: str | Layout | None = None,
    **sizes: int,
) -> Placement:
    """Find where the blocks of a cache lie.

    Args:
        layers: the tensor of each layer, or its tensors ``(keys, values)``; a mapping if layers
            have names.
        layout: a name of :data:`~kvcache.connectors.layout.axes.LAYOUTS`, or a layout of the
            caller's; ``None`` to find it from the shapes.
        sizes: known sizes of axes, by name: ``tokens=16, heads=8``. The tensors must have these
            sizes. They also distinguish between layouts.

    Raises:
        LayoutError: when there is no single layout of all layers; when elements of a tensor
            overlap; when the tensors are on several devices or differ in their number of blocks.
    """
    if not isinstance(layers, Mapping):
        layers = {str(number): layer for number, layer in enumerate(layers)}
    if not layers:
        raise LayoutError("there are no layers, so no blocks to copy")
    chosen = find_layout(layers, layout, sizes)
    tensors: list[TensorPlacement] = []
    for number, (name, layer) in enumerate(layers.items()):
        tensors += _place_layer(number, layer, axes_of(layer, chosen, sizes, name), name)
    _require_equal("block counts", [placed.block_axis.size for placed in tensors])
    _require_equal("devices", [str(placed.tensor.device) for placed in tensors])
    if len({placed.tensor.data_ptr() for placed in tensors}) < len(tensors):
        raise LayoutError("two of the tensors are the same memory; pass each tensor once")
    first = tensors[0]
    return Placement(chosen, first.block_axis.size, str(first.tensor.device), tuple(tensors))


def _require_equal(noun: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        raise LayoutError(
            f"the layers have several {noun}: {', '.join(sorted(map(str, {*values})))}"
        )


def _place_layer(
    number: int, layer: Layer, axes_of_tensors: list[list[Axis]], name: str
) -> list[TensorPlacement]:
    result = []
    for at, axes in enumerate(axes_of_tensors):
        [block_axis] = (axis for axis in axes if axis.name == "blocks")
        others = tuple(axis for axis in axes if axis is not block_axis)
        result.append(TensorPlacement(tensors_of(layer)[at], number, at, block_axis, others))
        _require_runs(result[-1], f"layer {name} is {describe(layer)}")
    return result


def _require_runs(placed: TensorPlacement, description: str) -> None:
    """Raise LayoutError if elements overlap or a block has too many runs."""
    nbytes = placed.tensor.element_size()
    for axis in reversed(replace(placed, axes=(*placed.axes, placed.block_axis)).axes_by_stride):
        if axis.stride < nbytes:
            raise LayoutError(f"{description}: elements overlap along axis {axis.name}")
        nbytes = axis.stride * axis.size
    outer, nbytes = placed.run_axes()
    if (runs := math.prod(axis.size for axis in outer)) > MAX_RUNS:
        raise LayoutError(
            f"{description}: a block of it has {runs} runs of {nbytes} bytes; at most {MAX_RUNS}"
            " can be copied one by one"
        )
