"""Where every block of an engine's cache lies, and in which order its bytes come: for all copies.

Always true here:

* The pages of a block are all its bytes, each once, in the order that they have in memory: layer
  after layer, tensor after tensor, axis by axis, the one with the widest stride first.
* ``format_id`` names the meaning of that order: caches of equal ``format_id`` can share bytes.
* No two elements of a tensor share an address; where that cannot be said, it is refused.
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
    find,
    seen,
    tensors_of,
)

MOST_RUNS = 4096
"""Runs of bytes that a block of a tensor may lie in; more are too short to be copied one by one."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """One run of bytes of every block: that of b is the `nbytes` at `address + b * stride`.

    0 <= b < `count`. `stride` is in bytes; it exceeds `nbytes` where something else lies between.
    `layer` is the number of the layer that it is of.
    """

    address: int
    nbytes: int
    stride: int
    count: int
    layer: int = 0

    def __post_init__(self) -> None:
        if self.nbytes < 1 or self.count < 1 or self.stride < self.nbytes:
            raise ValueError(f"{self}: nbytes and count must be at least 1, stride at least nbytes")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of one layer.

    Attributes:
        layer: its number, from 0.
        number: the tensor's among those of its layer.
        blocks: the axis of the blocks.
        axes: the others, outermost of the shape first.
    """

    tensor: Tensor
    layer: int
    number: int
    blocks: Axis
    axes: tuple[Axis, ...]

    @property
    def in_memory(self) -> list[Axis]:
        """The axes by stride, the widest first; those of one step lie nowhere."""
        wide = [axis for axis in self.axes if axis.size > 1]
        return sorted(wide, key=lambda axis: axis.stride, reverse=True)

    @property
    def format_id(self) -> str:
        """What the bytes of a block are, in their order."""
        axes = " ".join(f"{axis.name}:{axis.size}" for axis in self.in_memory)
        return f"{self.tensor.dtype} {axes}"

    def runs(self) -> tuple[list[Axis], int]:
        """The axes over which the runs of a block are spread, and the bytes of each run."""
        outer, nbytes = self.in_memory, self.tensor.element_size()
        while outer and outer[-1].stride == nbytes:
            nbytes *= outer.pop().size
        return outer, nbytes

    def pages(self) -> list[BlockRun]:
        """The runs of a block."""
        outer, nbytes = self.runs()
        steps = product(*(range(0, axis.size * axis.stride, axis.stride) for axis in outer))
        stride = self.blocks.stride if self.blocks.size > 1 else nbytes
        first = self.tensor.data_ptr()
        count = self.blocks.size
        return [BlockRun(first + sum(step), nbytes, stride, count, self.layer) for step in steps]


@dataclass(frozen=True, slots=True)
class Placement:
    """A whole cache; made by :func:`place`. It keeps the tensors alive.

    Attributes:
        blocks: how many there are, from 0.
        device: that all tensors are on, such as ``cpu`` or ``cuda:0``.
        parts: layer after layer.
    """

    layout: Layout
    blocks: int
    device: str
    parts: tuple[Part, ...]

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, of all layers."""
        return sum(page.nbytes for page in self.pages())

    @property
    def element_nbytes(self) -> int:
        """Bytes of the numbers that blocks are made of; of the widest, where they differ."""
        return max(part.tensor.element_size() for part in self.parts)

    @property
    def format_id(self) -> list[str]:
        """What the bytes of a block are, in their order; part of what sets blocks apart."""
        return [f"layer {part.layer}: {part.format_id}" for part in self.parts]

    def pages(self) -> list[BlockRun]:
        """The runs of a block, in the order that its bytes have outside the engine."""
        return [page for part in self.parts for page in part.pages()]


def place(
    layers: Sequence[Layer] | Mapping[str, Layer],
    layout: str | Layout | None = None,
    **sizes: int,
) -> Placement:
    """Find where the blocks of a cache lie.

    Args:
        layers: of every layer its tensor, or its tensors ``(keys, values)``; by name, if they have
            names.
        layout: a name of :data:`~kvcache.connectors.layout.axes.LAYOUTS`, or a layout of your own;
            ``None`` to tell it from shapes and strides.
        sizes: of axes, as far as they are known, by name: ``tokens=16, heads=8``. What is given
            must hold, and helps to tell layouts apart.

    Raises:
        LayoutError: when the layout cannot be told, or is not that of every layer; for tensors
            whose elements overlap, on several devices, or of differently many blocks.
    """
    if not isinstance(layers, Mapping):
        layers = {str(number): layer for number, layer in enumerate(layers)}
    if not layers:
        raise LayoutError("there are no layers, so no blocks to copy")
    chosen = find(layers, layout, sizes)
    parts: list[Part] = []
    for number, (name, layer) in enumerate(layers.items()):
        parts += _parts(number, layer, axes_of(layer, chosen, sizes, name), name)
    _one("block counts", [part.blocks.size for part in parts])
    _one("devices", [str(part.tensor.device) for part in parts])
    if len({part.tensor.data_ptr() for part in parts}) < len(parts):
        raise LayoutError("two of the tensors are the same memory; give each once")
    return Placement(chosen, parts[0].blocks.size, str(parts[0].tensor.device), tuple(parts))


def _one(noun: str, found: Sequence[object]) -> None:
    if len(set(found)) > 1:
        raise LayoutError(
            f"the layers have several {noun}: {', '.join(sorted(map(str, {*found})))}"
        )


def _parts(number: int, layer: Layer, found: list[list[Axis]], name: str) -> list[Part]:
    parts = []
    for at, axes in enumerate(found):
        [blocks] = (axis for axis in axes if axis.name == "blocks")
        others = tuple(axis for axis in axes if axis is not blocks)
        parts.append(Part(tensors_of(layer)[at], number, at, blocks, others))
        _check(parts[-1], f"layer {name} is {seen(layer)}")
    return parts


def _check(part: Part, where: str) -> None:
    """Refuse what cannot be copied run by run."""
    nbytes = part.tensor.element_size()
    for axis in reversed(replace(part, axes=(*part.axes, part.blocks)).in_memory):
        if axis.stride < nbytes:
            raise LayoutError(f"{where}: its elements overlap, along {axis.name} at least")
        nbytes = axis.stride * axis.size
    outer, nbytes = part.runs()
    if (runs := math.prod(axis.size for axis in outer)) > MOST_RUNS:
        raise LayoutError(
            f"{where}: a block of it lies in {runs} runs of {nbytes} bytes; there may be"
            f" {MOST_RUNS}, since each is copied by itself"
        )
