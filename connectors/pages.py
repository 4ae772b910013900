"""Page copies where the engine's cache and the slots are both in this process's memory.

Always true here, beside what `copier` says: a copy is over when the call returns.
"""

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

try:
    import numba
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.extending import intrinsic

    from kvcache.connectors.copier import Integers, Made, PageCopier, Sides, integers
except ImportError as error:
    raise ImportError(
        f"page copies on CPU need numba and numpy ({error}): pip install 'kvcache[torch]',"
        " or 'kvcache[vllm]', which has them too"
    ) from error

# A run begins far from the one before it, where the processor has nothing to foresee it by, and its
# end says nothing of where the next begins. So the lines that are read next are asked for this many
# bytes ahead, over the end of a run into the next; and the next one's first line when a run begins,
# since it takes longest to find out where a new page of memory is. Lines are written past the
# caches: what a cache would have to read first, only to have it overwritten, is not read. Of one
# contiguous copy, runs of 4 to 32 KiB were gathered at 0.76 to 0.90 by a memcpy each, and at 1.00
# to 1.14 so (at 0.90 to 1.05 with 1 KiB ahead); scattered at 0.96 to 1.04, and at 1.30 to 1.36.
_AHEAD = 4096
_LINE = 64

# Below this many bytes waking a second thread costs more than its share of the copy takes.
_ALONE_BELOW = 2 << 20

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
_memcpy.restype = ctypes.c_size_t


class CpuCopier(PageCopier):
    """Copies by the processor.

    Every copy is cut into `threads` shares of equal bytes, of which the calling thread copies one;
    `threads - 1` are started for the others.
    """

    def __init__(self, sides: Sides, *, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        super().__init__(blocks=sides.blocks, slots=sides.slots)
        self._sides = sides
        self._copy_share = _compiled()
        self._threads = threads
        # Starts a thread when it is first given a share, so none where threads is 1.
        self._pool = ThreadPoolExecutor(
            max(1, threads - 1), "kvcache-pages", _may_run_on, (_cores(),)
        )

    def close(self) -> None:
        super().close()
        self._pool.shutdown()

    def _gather(self, blocks: Integers, slots: Integers) -> Made:
        return self._copy(slots, *self._sides.slab, blocks, *self._sides.engine)

    def _scatter(self, slots: Integers, blocks: Integers, *_when: object) -> Made:
        return self._copy(blocks, *self._sides.engine, slots, *self._sides.slab)

    def _copy(self, *ends: Integers) -> Made:
        """Targets, their addresses and strides; sources, and theirs: as `_copy_share` takes."""
        begun = time.perf_counter()
        what = (*ends, self._sides.nbytes)
        total = len(what[0]) * int(self._sides.nbytes.sum())
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
    """Copy bytes [begin, end) of the stream of all runs: run after run of row after row."""
    runs, last_row = nbytes.size, targets.size - 1
    at = 0
    for row in range(targets.size):
        for run in range(runs):
            first = max(begin - at, 0)
            last = min(end - at, nbytes[run])
            if first < last:
                target = target_addresses[run] + targets[row] * target_strides[run]
                source = source_addresses[run] + sources[row] * source_strides[run]
                after = (run + 1) % runs
                row_after = min(row + (run + 1) // runs, last_row)
                following = source_addresses[after] + sources[row_after] * source_strides[after]
                _copy_run(target + first, source + first, last - first, following)
            at += nbytes[run]
    _settle()


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _copy_run(target: int, source: int, nbytes: int, following: int) -> None:
    """Copy one run; what will be read after it is at `following`."""
    _prefetch(following)
    head = min(-target % _LINE, nbytes)
    lines = head + (nbytes - head) // _LINE * _LINE
    near = max(lines - _AHEAD, head)  # from here on, what is ahead is in the next run
    if head:
        _memcpy(target, source, head)
    for at in range(head, near, _LINE):
        _prefetch(source + at + _AHEAD)
        _copy_line(target + at, source + at)
    for at in range(near, lines, _LINE):
        _prefetch(following + at - near)
        _copy_line(target + at, source + at)
    if lines < nbytes:
        _memcpy(target + lines, source + lines, nbytes - lines)


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_typing: Any, _address: Any) -> Any:
    """Ask for the line at an address. It need not be anybody's."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer, integer = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, *[integer] * 3])
        )
        at = builder.inttoptr(arguments[0], pointer)
        builder.call(prefetch, [at, integer(0), integer(3), integer(1)])  # a read, to keep, of data
        return context.get_dummy_value()

    return numba.void(numba.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _copy_line(_typing: Any, _target: Any, _source: Any) -> Any:
    """Copy a line, past the caches. The target must begin on one."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        line = ir.PointerType(ir.VectorType(ir.IntType(64), _LINE // 8))
        target, source = (builder.inttoptr(argument, line) for argument in arguments)
        read = builder.load(source)
        read.align = 1
        written = builder.store(read, target)
        written.align = _LINE
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        written.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return numba.void(numba.int64, numba.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _settle(_typing: Any) -> Any:
    """Have what was written past the caches be there before anything that comes after."""

    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba.void(), emit


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
