"""Chooses the copier for a cache by the device that the cache is on.

Invariant: a cache that cannot be copied is refused when it is registered, not at the first copy.

To support another device, implement `PageCopier` or `streams.Device`, and add it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvcache.connectors.layout.canonical import canonical_format_id, canonical_runs
from kvcache.connectors.layout.placement import Placement
from kvcache.connectors.transfer.base import CopyGeometry, PageCopier, check_shard
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.connectors.transfer.streams import Device
from kvcache.slab import Slab

Order = Literal["raw", "canonical"]
"""The order of the bytes of a block outside the engine: as in its pages, or canonical."""


def format_id(placement: Placement, order: Order = "raw") -> list[str]:
    """Return the meaning of a block's bytes in this order. It is a part of the namespace.

    Raises:
        LayoutError: when the canonical order is asked for and the cache has none.
        ValueError: for an unknown order.
    """
    if order == "raw":
        return placement.format_id
    if order != "canonical":
        raise ValueError(f"order is {order!r}; it must be 'raw' or 'canonical'")
    canonical_runs(placement, can_transpose=placement.device == "cpu")
    return canonical_format_id(placement)


def device_of(placement: Placement) -> Device | None:
    """Return the device that computes on these tensors and copies them; ``None`` for the CPU.

    Raises:
        ValueError: when no copier supports the device.
    """
    kind = placement.device.partition(":")[0]
    if kind == "cpu":
        return None
    if kind == "cuda":
        import torch

        if not torch.version.hip:
            from kvcache.connectors.transfer.cuda import CudaDevice

            return CudaDevice(torch.device(placement.device))
        kind = "a ROCm device"
    raise ValueError(
        f"the KV cache is on {kind}; this version copies only from and to CPUs and CUDA devices"
    )


def prepare_copies(placement: Placement, order: Order = "raw") -> None:
    """Compile in the background what the CPU needs to copy these tensors in this order.

    Raises:
        LayoutError: when the canonical order is asked for and the cache has none.
    """
    from kvcache.connectors.transfer.cpu import compile_in_background
    from kvcache.connectors.transfer.cpu_kernels import piece_widths

    transposes = canonical_runs(placement, can_transpose=True)[2] if order == "canonical" else []
    compile_in_background(piece_widths(cell for cell, *_ in transposes))


def open_copier(
    placement: Placement,
    slab: Slab,
    *,
    device: Device | None = None,
    order: Order = "raw",
    offset: int = 0,
    threads: int = 1,
) -> PageCopier:
    """Open the copier between these tensors and the slots of this slab.

    Args:
        device: the placement's :func:`device_of`; ``None`` for the CPU.
        order: the order of the bytes in a slot.
        offset: bytes from the beginning of a slot to this rank's shard.
        threads: how many threads share a copy by the CPU.
    """
    if order == "canonical":
        check_shard(offset, placement.block_nbytes, slab.slot_nbytes)
        runs, offsets, transposes = canonical_runs(placement, can_transpose=device is None)
    else:
        runs, offsets, transposes = placement.runs(), None, []
    geometry = CopyGeometry(
        runs,
        offsets,
        slab_address=slab.address,
        slots=slab.slots,
        slot_nbytes=slab.slot_nbytes,
        offset=offset,
        transposes=transposes,
    )
    return open_geometries([geometry], device=device, threads=threads)


def open_geometries(
    geometries: Sequence[CopyGeometry], *, device: Device | None = None, threads: int = 1
) -> PageCopier:
    """Open the copier of blocks of several kinds in one slab.

    Args:
        geometries: one for each kind.
        device: of the engine's tensors; ``None`` for the CPU.
        threads: how many threads share a copy by the CPU.
    """
    if device is not None:
        return DeviceCopier(*geometries, device=device)
    # Not needed for a device, and imports numba.
    from kvcache.connectors.transfer.cpu import CpuCopier

    return CpuCopier(*geometries, threads=threads)
