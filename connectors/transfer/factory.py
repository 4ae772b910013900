"""The seam of copying: which mechanism moves the blocks of a cache, by where it is.

Always true here: a cache that nothing here can copy is refused when it is registered, not when its
first block is to be moved.

A mechanism for another device is a `PageCopier`, or a `streams.Device`, and a line here.
"""

from __future__ import annotations

from typing import Literal

from kvcache.connectors.layout.canonical import canonical_form, canonical_runs
from kvcache.connectors.layout.placement import Placement
from kvcache.connectors.transfer.base import CopyGeometry, PageCopier, check_shard
from kvcache.connectors.transfer.cpu import CpuCopier
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.connectors.transfer.streams import Device
from kvcache.slab import Slab

Order = Literal["raw", "canonical"]
"""Of the bytes of a block outside the engine: as its pages have them, or one for all layouts."""


def format_id(placement: Placement, order: Order = "raw") -> list[str]:
    """What a block's bytes mean in this order. It belongs to the namespace: it sets blocks apart.

    Raises:
        LayoutError: for a cache that has no canonical order, where that is asked for.
        ValueError: for another order.
    """
    if order == "raw":
        return placement.format_id
    if order != "canonical":
        raise ValueError(f"order is {order!r}; there are 'raw' and 'canonical'")
    canonical_runs(placement, turned=placement.device == "cpu")
    return canonical_form(placement)


def device_of(placement: Placement) -> Device | None:
    """What computes on these tensors and copies them; ``None`` is this processor.

    Raises:
        ValueError: for a cache that nothing here copies.
    """
    kind = placement.device.partition(":")[0]
    if kind == "cpu":
        return None
    if kind == "cuda":
        import torch

        if not torch.version.hip:
            from kvcache.connectors.transfer.cuda import Cuda

            return Cuda(torch.device(placement.device))
        kind = "a device of ROCm"
    raise ValueError(
        f"the KV cache is on {kind}; this version copies from and to a CPU and CUDA devices"
    )


def open_copier(
    placement: Placement,
    slab: Slab,
    *,
    device: Device | None = None,
    order: Order = "raw",
    offset: int = 0,
    threads: int = 1,
) -> PageCopier:
    """The mechanism that copies between these tensors and the slots of this slab.

    Args:
        device: of the placement, by :func:`device_of`; ``None`` is this processor.
        order: of the bytes in a slot.
        offset: where in a slot this rank's shard begins, in bytes.
        threads: that a copy by the processor may be shared out among.
    """
    where = {"slab_address": slab.address, "slots": slab.slots, "slot_nbytes": slab.slot_nbytes}
    if order == "canonical":
        check_shard(offset, placement.block_nbytes, slab.slot_nbytes)
        pages, begins, turns = canonical_runs(placement, turned=device is None)
    else:
        pages, begins, turns = placement.pages(), None, []
    sides = CopyGeometry(pages, begins, offset=offset, **where)
    if device is not None:
        return DeviceCopier(sides, device)
    return CpuCopier(sides, turns=turns, threads=threads)
