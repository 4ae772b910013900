"""The canonical order of a block's bytes: what engines with different layouts can share.

A block in this order is one array of ``[tokens, layers, kv, heads, dim]``, or ``[tokens, layers,
latent]``: whatever a layout has of these names, dense, the last one fastest. Numbers stay as they
are, bit by bit; only where they lie is changed, element by element if need be.

Always true here: two caches whose canonical forms are equal mean the same by every byte.
"""

from __future__ import annotations

import ctypes
import math
import time
from typing import Any

from kvcache.connectors.copier import Integers, Made, PageCopier, check_shard
from kvcache.connectors.layouts import LayoutError, sizes_of
from kvcache.connectors.placement import Part, Placement

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


class CanonicalCopier(PageCopier):
    """Copies between an engine's cache and slots in canonical order, both in host memory.

    Slots and shards are those of :class:`~kvcache.connectors.copier.Sides`. The copies are
    torch's, one per tensor and block, in the calling thread: a second one made none of them faster.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        slab_address: int,
        slots: int,
        slot_nbytes: int,
        offset: int = 0,
    ) -> None:
        import torch

        super().__init__(blocks=placement.blocks, slots=slots)
        check_shard(offset, placement.block_nbytes, slot_nbytes)
        nbytes = placement.element_nbytes
        if offset % nbytes or slot_nbytes % nbytes:
            raise ValueError(f"offset {offset}: numbers of {nbytes} bytes begin on such a multiple")
        whole = (ctypes.c_uint8 * (slots * slot_nbytes)).from_address(slab_address)
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[nbytes]
        slab = torch.frombuffer(whole, dtype=integers)
        sizes = canonical_sizes(placement)
        self._pairs: list[tuple[Any, Any]] = []  # of every tensor: the engine's, the slots'
        for part in placement.parts:
            shape = [axis.size for axis in part.axes]
            cache = part.tensor.view(integers)  # type: ignore[attr-defined]
            engine = cache.as_strided(
                [part.blocks.size, *shape],
                [axis.stride // nbytes for axis in (part.blocks, *part.axes)],
                cache.storage_offset(),
            )
            first, strides = _inside_a_block(part, sizes)
            slotted = slab.as_strided(
                [slots, *shape], [slot_nbytes // nbytes, *strides], offset // nbytes + first
            )
            self._pairs.append((engine, slotted))

    def _gather(self, blocks: Integers, slots: Integers) -> Made:
        begun, rows = time.perf_counter(), list(zip(blocks.tolist(), slots.tolist(), strict=True))
        for engine, slotted in self._pairs:
            for block, slot in rows:
                slotted[slot].copy_(engine[block])
        return Made(time.perf_counter() - begun)

    def _scatter(self, slots: Integers, blocks: Integers, *_when: object) -> Made:
        begun, rows = time.perf_counter(), list(zip(blocks.tolist(), slots.tolist(), strict=True))
        for engine, slotted in self._pairs:
            for block, slot in rows:
                engine[block].copy_(slotted[slot])
        return Made(time.perf_counter() - begun)


def _inside_a_block(part: Part, sizes: dict[str, int]) -> tuple[int, list[int]]:
    """Where a tensor's numbers begin in a canonical block, and its axes' strides: in elements."""
    names = list(sizes)
    step = {name: math.prod([sizes[n] for n in names[at + 1 :]]) for at, name in enumerate(names)}
    first = part.layer * step["layers"]
    if part.number:
        first += step["kv"]
    strides = []
    for axis in reversed(part.axes):
        strides.append(step.get(axis.name, 0))
        if axis.name in step:
            step[axis.name] *= axis.size  # the part of the name that is outside this one
    return first, strides[::-1]
