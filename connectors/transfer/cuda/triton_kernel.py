"""Copies by the processors of a GPU: a kernel that reads and writes pinned host memory.

Every run costs a copy engine time of its own, whatever its size, and a kernel next to none. But a
kernel takes processors from the model, so this one takes few. And what it touches must be there, or
CUDA ends every work of this process on the device.

Always true here: nothing is copied but runs that begin and end on 16 bytes, and whose host side is
pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kvcache.connectors.transfer.autotune import CopyBatch
from kvcache.connectors.transfer.base import Integers

_WORD = 8  # bytes; a thread moves two at a time, 16 bytes, if it is told that addresses allow it
_ACCESS = 2 * _WORD

# At full speed a bus has some 100 KB under way: 16 programs ask for 8 KiB each. They take an eighth
# of the multiprocessors of an H100, or less.
_PROGRAMS = 16
_CHUNK = 8192 // _WORD


@triton.jit(do_not_specialize=["table", "runs", "chunks"])  # type: ignore[untyped-decorator]
def _copy_runs(table, runs, chunks, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program p makes the pieces p, p + programs, ... of all runs; a run has at most `chunks`."""
    lanes = tl.arange(0, chunk)
    for piece in range(tl.program_id(0), runs * chunks, tl.num_programs(0)):
        run = piece // chunks
        # None of the three waits for another. The compiler has to be told what they divide by.
        target = tl.load(table + run).to(tl.pointer_type(tl.int64))
        source = tl.load(table + runs + run).to(tl.pointer_type(tl.int64))
        words = tl.multiple_of(tl.load(table + 2 * runs + run) // 8, 2)
        at = piece % chunks * chunk + lanes
        read = tl.load(tl.multiple_of(source, 16) + at, mask=at < words)
        tl.store(tl.multiple_of(target, 16) + at, read, mask=at < words)


class Kernel:
    """Copies by a kernel.

    `send` gives it a table where the kernel can read it, on the stream that the kernel is started
    on, and sees to it that it stays there until that stream is past its use.
    """

    name = "a kernel"

    def __init__(self, send: Callable[[Integers], Any]) -> None:
        self._send = send

    def takes(self, runs: CopyBatch) -> bool:
        if runs.way is None:
            return False
        return not int(np.bitwise_or.reduce(runs.targets | runs.sources | runs.nbytes)) % _ACCESS

    def copy(self, runs: CopyBatch) -> None:
        table = self._send(np.stack((runs.targets, runs.sources, runs.nbytes)))
        count, chunks = len(runs), -(-int(runs.nbytes.max()) // (_CHUNK * _WORD))
        # What differs between calls is not specialized: nothing is compiled after the first.
        _copy_runs[(min(_PROGRAMS, count * chunks),)](table, count, chunks, chunk=_CHUNK)


def compiled() -> bool:
    """Whether it runs on a device. Interpreted, as tests do, it touches all memory from here."""
    return isinstance(_copy_runs, triton.runtime.JITFunction)
