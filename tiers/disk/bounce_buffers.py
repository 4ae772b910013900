"""Buffers of aligned pages, for memory that direct I/O cannot read or write."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from kvcache.tiers.disk.record_file import PAGE


class BounceBuffers:
    """A fixed number of buffers; a caller waits while all are lent.

    Args:
        count: how many buffers.
        nbytes: bytes of each, a multiple of :data:`PAGE`.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(count):
            self._free.put(mmap.mmap(-1, nbytes))

    @property
    def free_count(self) -> int:
        """How many buffers are not lent."""
        return self._free.qsize()

    @contextmanager
    def lend(self, nbytes: int) -> Iterator[memoryview]:
        """Yield a buffer of at least ``nbytes`` bytes, in whole pages."""
        buffer = self._free.get()
        try:
            yield memoryview(buffer)[: -(-nbytes // PAGE) * PAGE]
        finally:
            self._free.put(buffer)

    @contextmanager
    def aligned(self, view: memoryview) -> Iterator[memoryview]:
        """Yield ``view`` if it is whole aligned pages; otherwise a buffer of at least its size."""
        if is_aligned(view):
            yield view
        else:
            with self.lend(len(view)) as buffer:
                yield buffer


def is_aligned(view: memoryview) -> bool:
    """Whether direct I/O can use ``view``: it is whole aligned pages."""
    return not view.readonly and not len(view) % PAGE and not _address(view) % PAGE


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0
