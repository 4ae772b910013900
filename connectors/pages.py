"""Page copies where the engine's cache and the slots are both in this process's memory.

Always true here, beside what `copier` says: a copy is over when the call returns.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

try:
    import numba
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.extending import intrinsic

    from kvcache.connectors.copier import (
        Integers,
        Made,
        PageCopier,
        Pages,
        Side,
        Sides,
        integers,
        paired,
    )
except ImportError as error:
    raise ImportError(
        f"page copies on CPU need numba and numpy ({error}): pip install 'kvcache[vllm]'"
    ) from error

# A page begins far from the one before it, where the processor has nothing to foresee it by: asked
# for a page early, its first lines are there in time. A gather of 64 KiB pages ran at 1.09 of a
# contiguous copy with 16 to 64 lines, at 1.03 with 8, at 0.87 with one; a scatter does not care.
_LINES_AHEAD = 32

# Below this many bytes waking a second thread costs more than its share of the copy takes.
_ALONE_BELOW = 2 << 20

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
_memcpy.restype = ctypes.c_size_t


class CpuCopier(PageCopier):
    """Copies by the processor; safe to call from several threads.

    Every copy is cut into `threads` shares of equal bytes, of which the calling thread copies one;
    `threads - 1` are started for the others. The other arguments are those of `Sides`.
    """

    def __init__(
        self,
        layers: Sequence[Pages],
        *,
        slab_address: int,
        slots: int,
        slot_nbytes: int,
        offset: int = 0,
        threads: int = 1,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        self._sides = Sides(
            layers, slab_address=slab_address, slots=slots, slot_nbytes=slot_nbytes, offset=offset
        )
        self._copy_share = _compiled()
        self._threads = threads
        # Starts a thread when it is first given a share, so none where threads is 1.
        self._pool = ThreadPoolExecutor(
            max(1, threads - 1), "kvcache-pages", _may_run_on, (_cores(),)
        )
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()

    def gather(self, blocks: Sequence[int], slots: Sequence[int]) -> Made:
        return self._copy(self._sides.blocks, blocks, self._sides.slots, slots)

    def scatter(self, slots: Sequence[int], blocks: Sequence[int], *, awaited: bool = True) -> Made:
        return self._copy(self._sides.slots, slots, self._sides.blocks, blocks)

    def fence(self, blocks: Collection[int]) -> None:
        """Nobody reads blocks when a call has returned."""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._running)
        self._pool.shutdown()

    def _copy(
        self, source: Side, sources: Sequence[int], target: Side, targets: Sequence[int]
    ) -> Made:
        begun = time.perf_counter()
        with self._in_flight():
            read, written = paired(source, sources, target, targets)
            nbytes = self._sides.nbytes
            what = (
                *(written, target.addresses, target.strides),
                *(read, source.addresses, source.strides),
                nbytes,
            )
            total = len(read) * int(nbytes.sum())
            shares = 1 if total < _ALONE_BELOW else self._threads
            own, *others = pairwise([total * cut // shares for cut in range(shares + 1)])
            lent = [(self._pool.submit(self._copy_share, *what, *share), share) for share in others]
            self._copy_share(*what, *own)
            for future, share in lent:
                if future.cancel():  # nobody has begun it, and this thread has nothing else to do
                    self._copy_share(*what, *share)
                else:
                    future.result()
        return Made(time.perf_counter() - begun)

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise RuntimeError("this page copier is closed")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


def prepare() -> None:
    """Have everything compiled that a copy needs, so that no request waits for it."""
    _compiled()


def _copy_share(
    targets: Integers,
    target_addresses: Integers,
    target_strides: Integers,
    sources: Integers,
    source_addresses: Integers,
    source_strides: Integers,
    nbytes: Integers,
    begin: int,
    end: int,
) -> None:
    """Copy bytes [begin, end) of the stream of all pages: layer after layer of row after row."""
    layers, last_row = nbytes.size, targets.size - 1
    at = 0
    for row in range(targets.size):
        for layer in range(layers):
            first = max(begin - at, 0)
            last = min(end - at, nbytes[layer])
            if first < last:
                target = target_addresses[layer] + targets[row] * target_strides[layer]
                source = source_addresses[layer] + sources[row] * source_strides[layer]
                after = (layer + 1) % layers
                row_after = min(row + (layer + 1) // layers, last_row)
                following = source_addresses[after] + sources[row_after] * source_strides[after]
                for line in range(_LINES_AHEAD):
                    _prefetch(following + line * 64)
                _memcpy(target + first, source + first, last - first)
            at += nbytes[layer]


def _emit_prefetch(_typing: Any, _address: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer, integer = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, *[integer] * 3])
        )
        at = builder.inttoptr(arguments[0], pointer)
        builder.call(prefetch, [at, integer(0), integer(3), integer(1)])  # a read, to keep, of data
        return context.get_dummy_value()

    return numba.void(numba.int64), emit


_prefetch = intrinsic(_emit_prefetch)


@cache
def _compiled() -> Callable[..., None]:
    """`_copy_share` as machine code that releases the GIL, ready before the first request.

    Not `parallel`: numba's own threads are not safe under concurrent callers, or are the engine's.
    Not cached on disk: a fifth of a second at start is cheaper than a folder that must be writable.
    """
    array, integer = numba.int64[::1], numba.int64
    signature = numba.void(*[array] * 7, integer, integer)
    compiled: Callable[..., None] = numba.njit(signature, nogil=True)(_copy_share)
    compiled(*[integers([])] * 7, 0, 0)  # the first call looks the signature up, for milliseconds
    return compiled


def _cores() -> set[int]:
    """The cores that the threads of this process may use, together."""
    cores: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended since
            cores |= os.sched_getaffinity(int(thread.name))
    return cores


def _may_run_on(cores: set[int]) -> None:
    # An engine pins its threads one to a core, and a thread inherits its creator's pin: a worker
    # would share the one core of the thread that waits for it.
    with suppress(OSError):  # where that is forbidden the copy is slower, not wrong
        os.sched_setaffinity(0, cores)
