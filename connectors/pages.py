"""Page copies between an engine's KV cache and slots of host memory.

A block lies in an engine's cache in one run of bytes per layer, or several (`placement.Pages`). A
slot holds one block of every rank: this rank's shard begins at `offset` in the slot and is those
runs, one after another.

Always true here:
- Only whole pages move, and nothing outside them is read or written.
- A call refused for its arguments has moved nothing; a call that returns has moved everything.
- After `close` returns no copy is running and none can begin, so the memory may be unmapped.
"""

import ctypes
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

try:
    import numba
    import numpy as np
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.extending import intrinsic
    from numpy.typing import NDArray
except ImportError as error:
    raise ImportError(
        f"page copies on CPU need numba and numpy ({error}): pip install 'kvcache[torch]',"
        " or 'kvcache[vllm]', which has them too"
    ) from error

from kvcache.connectors.placement import Pages

_Integers = NDArray[np.int64]

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


class PageCopier(ABC):
    """Moves blocks between one rank's pages and its shards of the slots; safe to call from threads.

    Both copies take two sequences of equal length: the i-th block goes with the i-th slot.
    They raise ValueError when the lengths differ or two copies have the same target, IndexError
    for a block or slot that does not exist, RuntimeError after `close`. A mechanism has two methods
    to fill in; what it is given there has been checked.
    """

    def __init__(self, *, blocks: int, slots: int) -> None:
        self._counts = {"block": blocks, "slot": slots}
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()

    def gather(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy the engine's pages of `blocks` into `slots`."""
        with self._in_flight():
            self._gather(*self._checked(block=blocks, slot=slots))

    def scatter(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy the shards in `slots` to the engine's pages of `blocks`."""
        with self._in_flight():
            self._scatter(*self._checked(slot=slots, block=blocks))

    def close(self) -> None:
        """Wait for running copies and refuse new ones. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._running)

    @abstractmethod
    def _gather(self, blocks: _Integers, slots: _Integers) -> None: ...

    @abstractmethod
    def _scatter(self, slots: _Integers, blocks: _Integers) -> None: ...

    def _checked(self, **given: Sequence[int]) -> list[_Integers]:
        """Sources and targets as arrays, every one of them looked at."""
        (source, sources), (target, targets) = given.items()
        if len(sources) != len(targets):
            raise ValueError(
                f"{len(sources)} {source}s do not pair up with {len(targets)} {target}s"
            )
        rows = [_integers(ids) for ids in (sources, targets)]
        for noun, ids in zip(given, rows, strict=True):
            count = self._counts[noun]
            if len(ids) and (ids.min() < 0 or ids.max() >= count):
                wrong = next(row for row in ids.tolist() if not 0 <= row < count)
                raise IndexError(f"{noun} {wrong} does not exist: there are {count}, from 0")
        if len(set(targets)) < len(targets):
            raise ValueError(f"a {target} is the target of two copies: {list(targets)}")
        return rows

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


class CpuCopier(PageCopier):
    """Copies between pages and slots that are both in this process's memory.

    `pages` are this rank's, in the order of its shard; blocks exist that all of them have.
    Slot s begins at `slab_address + s * slot_nbytes`, the shard `offset` bytes further. Engine and
    slab must not overlap. Every copy is cut into `threads` shares of equal bytes, of which the
    calling thread copies one; `threads - 1` are started for the others.
    """

    def __init__(
        self,
        pages: Sequence[Pages],
        *,
        slab_address: int,
        slots: int,
        slot_nbytes: int,
        offset: int = 0,
        threads: int = 1,
    ) -> None:
        if not pages:
            raise ValueError("there are no pages to copy")
        if threads < 1 or slots < 1:
            raise ValueError(f"threads={threads} and slots={slots} must be at least 1")
        super().__init__(blocks=min(page.count for page in pages), slots=slots)
        *begins, end = accumulate((page.nbytes for page in pages), initial=offset)
        check_shard(offset, end - offset, slot_nbytes)
        self._nbytes = _integers([page.nbytes for page in pages])
        self._engine = (
            _integers([page.address for page in pages]),
            _integers([page.stride for page in pages]),
        )
        self._slab = (
            _integers([slab_address + begin for begin in begins]),
            _integers([slot_nbytes] * len(pages)),
        )
        self._copy_share = _compiled()
        self._threads = threads
        # Starts a thread when it is first given a share, so none where threads is 1.
        self._pool = ThreadPoolExecutor(
            max(1, threads - 1), "kvcache-pages", _may_run_on, (_cores(),)
        )

    def close(self) -> None:
        super().close()
        self._pool.shutdown()

    def _gather(self, blocks: _Integers, slots: _Integers) -> None:
        self._copy(slots, *self._slab, blocks, *self._engine, self._nbytes)

    def _scatter(self, slots: _Integers, blocks: _Integers) -> None:
        self._copy(blocks, *self._engine, slots, *self._slab, self._nbytes)

    def _copy(self, *what: _Integers) -> None:
        """Targets, their addresses and strides; sources, theirs; bytes: as `_copy_share` takes."""
        total = len(what[0]) * int(self._nbytes.sum())
        shares = 1 if total < _ALONE_BELOW else self._threads
        own, *others = pairwise([total * cut // shares for cut in range(shares + 1)])
        lent = [(self._pool.submit(self._copy_share, *what, *share), share) for share in others]
        self._copy_share(*what, *own)
        for future, share in lent:
            if future.cancel():  # nobody has begun it, and this thread has nothing else to do
                self._copy_share(*what, *share)
            else:
                future.result()


def check_shard(offset: int, nbytes: int, slot_nbytes: int) -> None:
    """Raise ValueError for a shard that does not lie inside a slot."""
    if offset < 0 or offset + nbytes > slot_nbytes:
        raise ValueError(
            f"a shard of {nbytes} bytes at offset {offset}"
            f" does not lie inside a slot of {slot_nbytes} bytes"
        )


def prepare() -> None:
    """Have everything compiled that a copy needs, so that no request waits for it."""
    _compiled()


def _integers(values: Sequence[int]) -> _Integers:
    return np.array(values, dtype=np.int64)


def _copy_share(
    targets: _Integers,
    target_addresses: _Integers,
    target_strides: _Integers,
    sources: _Integers,
    source_addresses: _Integers,
    source_strides: _Integers,
    nbytes: _Integers,
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
    compiled(*[_integers([])] * 7, 0, 0)  # the first call looks the signature up, for milliseconds
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
