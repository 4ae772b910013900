"""The seam of copying: which mechanism moves the blocks of a cache, by where it is.

Always true here: a cache that nothing here can copy is refused when it is registered, not when its
first block is to be moved.

A mechanism for another device is a `PageCopier` that takes a `Placement`, and a line in
`open_copier`. It is given the slab's address, which it may register as pinned memory, and the runs
of every block, which it may copy in batches on a stream of its own.
"""

from __future__ import annotations

from typing import Literal

from kvcache.connectors.canonical import CanonicalCopier, canonical_form
from kvcache.connectors.pages import CpuCopier, PageCopier
from kvcache.connectors.placement import Placement
from kvcache.slab import Slab

Order = Literal["raw", "canonical"]
"""Of the bytes of a block outside the engine: as its pages have them, or one for all layouts."""


def form(placement: Placement, order: Order = "raw") -> list[str]:
    """What a block's bytes mean in this order. It belongs to the namespace: it sets blocks apart.

    Raises:
        LayoutError: for a cache that has no canonical order, where that is asked for.
        ValueError: for another order, and for a cache that is not in host memory.
    """
    if placement.device != "cpu":
        raise ValueError(
            f"the KV cache is on {placement.device}; this version copies between host memory only"
        )
    if order == "raw":
        return placement.form
    if order == "canonical":
        return canonical_form(placement)
    raise ValueError(f"order is {order!r}; there are 'raw' and 'canonical'")


def open_copier(
    placement: Placement, slab: Slab, *, order: Order = "raw", offset: int = 0, threads: int = 1
) -> PageCopier:
    """The mechanism that copies between these tensors and the slots of this slab.

    Args:
        order: of the bytes in a slot.
        offset: where in a slot this rank's shard begins, in bytes.
        threads: that a copy may be shared out among.
    """
    form(placement, order)  # refuses what cannot be
    where = {"slab_address": slab.address, "slots": slab.slots, "slot_nbytes": slab.slot_nbytes}
    if order == "canonical":
        return CanonicalCopier(placement, offset=offset, **where)
    return CpuCopier(placement.pages(), offset=offset, threads=threads, **where)
