"""A Triton kernel that copies between device memory and pinned host memory.

A copy engine takes a fixed time for each run, whatever its size; a kernel takes nearly none. But a
kernel occupies processors that the model could use, so this one uses few. An access of a kernel to
memory that is not mapped ends all work of the process on the device.

Invariant: the kernel copies a run only if its addresses and its size are multiples of 16 bytes and
its host side is pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.copy_batch import CopyBatch

_WORD_NBYTES = 8
_ACCESS_NBYTES = 16  # a thread moves two words at once if the compiler knows the alignment

# A bus at full speed has about 100 KB in flight: 16 programs request 8 KiB each. They occupy an
# eighth of the multiprocessors of an H100, or less.
_PROGRAMS = 16
CHUNK_WORDS = 8192 // _WORD_NBYTES


@triton.jit(do_not_specialize=["table", "runs", "chunks"])  # type: ignore[untyped-decorator]
def copy_runs(table, runs, chunks, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy chunks p, p + programs, ... of all runs in program p. A run has at most `chunks`."""
    lanes = tl.arange(0, chunk)
    for number in range(tl.program_id(0), runs * chunks, tl.num_programs(0)):
        run = number // chunks
        # Three independent loads. `multiple_of` tells the compiler the alignment.
        target = tl.load(table + run).to(tl.pointer_type(tl.int64))
        source = tl.load(table + runs + run).to(tl.pointer_type(tl.int64))
        words = tl.multiple_of(tl.load(table + 2 * runs + run) // 8, 2)
        at = number % chunks * chunk + lanes
        read = tl.load(tl.multiple_of(source, 16) + at, mask=at < words)
        tl.store(tl.multiple_of(target, 16) + at, read, mask=at < words)


class TritonKernel:
    """Copies a batch by one launch of the kernel.

    `send` copies a table to where the kernel can read it, in the order of the current stream, and
    keeps it there until the stream has passed the launch.
    """

    name = "triton"

    def __init__(self, send: Callable[[Integers], Any]) -> None:
        self._send = send

    def supports(self, batch: CopyBatch) -> bool:
        if batch.direction is None:
            return False
        bits = np.bitwise_or.reduce(batch.targets | batch.sources | batch.nbytes)
        return not int(bits) % _ACCESS_NBYTES

    def copy(self, batch: CopyBatch) -> None:
        table = self._send(np.stack((batch.targets, batch.sources, batch.nbytes)))
        count, chunks = len(batch), -(-int(batch.nbytes.max()) // (CHUNK_WORDS * _WORD_NBYTES))
        # The arguments that differ between calls are not specialized, so that only the first call
        # compiles.
        grid = (min(_PROGRAMS, count * chunks),)
        copy_runs[grid](table, count, chunks, chunk=CHUNK_WORDS)


def compiled() -> bool:
    """Whether the kernel runs on a device. Tests run it interpreted, on this process's memory."""
    return isinstance(copy_runs, triton.runtime.JITFunction)
