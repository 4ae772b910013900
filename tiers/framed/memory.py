"""The memory of frames: that of the inner tier if it has some, else mapped here."""

from __future__ import annotations

import mmap
from contextlib import suppress

from kvcache.guards.calls import result_of
from kvcache.tier import Tier


def allocate_in_tier(tier: Tier, nbytes: int) -> memoryview | None:
    """Return ``nbytes`` bytes of the memory of ``tier``; ``None`` if it has none.

    Raises:
        TierError: its ``allocate`` fails, or returns memory that cannot hold frames.
    """

    def allocate() -> memoryview | None:
        memory: object = tier.allocate(nbytes)
        if memory is None:
            return None
        if not isinstance(memory, memoryview):
            raise TypeError(f"allocate returned {type(memory).__name__}, not a memoryview")
        if memory.readonly or not memory.c_contiguous or memory.nbytes < nbytes:
            raise ValueError(f"allocate returned memory that cannot hold {nbytes} bytes")
        return memory.cast("B")[:nbytes]

    return result_of(allocate)


def map_memory(nbytes: int) -> mmap.mmap:
    """Map zeroed memory, in huge pages if the kernel has some.

    One request to a disk takes a limited number of memory segments, and a block in small pages can
    exceed it. A forked child does not get the memory: copy-on-write would move pages of the parent
    while direct I/O writes to them.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with suppress(OSError):
            memory.madvise(advice)
    return memory
