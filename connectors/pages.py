"""Page copies between an engine's KV cache and slots of host memory.

An engine keeps one region of memory per layer, cut into pages; block b is page b of every layer.
A slot holds one block of every rank: this rank's shard begins at `offset` in the slot and is the
pages of its layers, one after another.

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
from dataclasses import dataclass
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
        f"page copies on CPU need numba and numpy ({error}): pip install 'kvcache[vllm]'"
    ) from error

_Integers = NDArray[np.int64]

# A page begins far from the one before it, where the processor has nothing to foresee it by: asked
# for a page early, its first lines are there in time. A gather of 64 KiB pages ran at 1.09 of a
# contiguous copy with 16 to 64 lines, at 1.03 with 8, at 0.87 with one; a scatter does not care.
_LINES_AHEAD = 32

# Below this many bytes waking a second thread costs more than its share of the copy takes.
_ALONE_BELOW = 2 << 20

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
_memcpy.restype = ctypes.c_size_t


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's pages: page b is the `nbytes` bytes at `address + b * stride`, 0 <= b < `count`.

    `stride` is in bytes; it exceeds `nbytes` where the engine interleaves layers.
    """

    address: int
    nbytes: int
    stride: int
    count: int

    def __post_init__(self) -> None:
        if self.nbytes < 1 or self.count < 1 or self.stride < self.nbytes:
            raise ValueError(f"{self}: nbytes and count must be at least 1, stride at least nbytes")


class PageCopier(ABC):
    """Moves blocks between one rank's pages and its shards of the slots; safe to call from threads.

    Both copies take two sequences of equal length: the i-th block goes with the i-th slot.
    They raise ValueError when the lengths differ or two copies have the same target, IndexError
    for a block or slot that does not exist, RuntimeError after `close`.
    """

    @abstractmethod
    def gather(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy the engine's pages of `blocks` into `slots`."""

    @abstractmethod
    def scatter(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy the shards in `slots` to the engine's pages of `blocks`."""

    @abstractmethod
    def close(self) -> None:
        """Wait for running copies and refuse new ones. May be called again."""


class CpuCopier(PageCopier):
    """Copies between pages and slots that are both in this process's memory.

    `layers` are this rank's pages, in the order of its shard; blocks exist that every layer has.
    Slot s begins at `slab_address + s * slot_nbytes`, the shard `offset` bytes further. Engine and
    slab must not overlap. Every copy is cut into `threads` shares of equal bytes, of which the
    calling thread copies one; `threads - 1` are started for the others.
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
        if not layers:
            raise ValueError("layers is empty: there are no pages to copy")
        if threads < 1 or slots < 1:
            raise ValueError(f"threads={threads} and slots={slots} must be at least 1")
        *begins, end = accumulate((layer.nbytes for layer in layers), initial=offset)
        if offset < 0 or end > slot_nbytes:
            raise ValueError(
                f"a shard of {end - offset} bytes at offset {offset}"
                f" does not lie inside a slot of {slot_nbytes} bytes"
            )
        self._nbytes = _integers([layer.nbytes for layer in layers])
        self._blocks = _Side(
            "block",
            min(layer.count for layer in layers),
            _integers([layer.address for layer in layers]),
            _integers([layer.stride for layer in layers]),
        )
        self._slots = _Side(
            "slot",
            slots,
            _integers([slab_address + begin for begin in begins]),
            _integers([slot_nbytes] * len(layers)),
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

    def gather(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        self._copy(self._blocks, blocks, self._slots, slots)

    def scatter(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        self._copy(self._slots, slots, self._blocks, blocks)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._running)
        self._pool.shutdown()

    def _copy(
        self, source: "_Side", sources: Sequence[int], target: "_Side", targets: Sequence[int]
    ) -> None:
        with self._in_flight():
            if len(sources) != len(targets):
                raise ValueError(
                    f"{len(sources)} {source.noun}s do not pair up with"
                    f" {len(targets)} {target.noun}s"
                )
            read, written = source.rows(sources), target.rows(targets)
            if len(set(targets)) < len(targets):
                raise ValueError(f"a {target.noun} is the target of two copies: {list(targets)}")
            what = (
                *(written, target.addresses, target.strides),
                *(read, source.addresses, source.strides),
                self._nbytes,
            )
            total = len(read) * int(self._nbytes.sum())
            shares = 1 if total < _ALONE_BELOW else self._threads
            own, *others = pairwise([total * cut // shares for cut in range(shares + 1)])
            lent = [(self._pool.submit(self._copy_share, *what, *share), share) for share in others]
            self._copy_share(*what, *own)
            for future, share in lent:
                if future.cancel():  # nobody has begun it, and this thread has nothing else to do
                    self._copy_share(*what, *share)
                else:
                    future.result()

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


@dataclass(frozen=True, slots=True)
class _Side:
    """Where each layer's pages lie on one side of a copy, and how many rows of them there are."""

    noun: str
    count: int
    addresses: _Integers
    strides: _Integers

    def rows(self, ids: Sequence[int]) -> _Integers:
        """`ids` as an array, every one of them checked."""
        rows = _integers(ids)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.count):
            wrong = next(row for row in ids if not 0 <= row < self.count)
            raise IndexError(f"{self.noun} {wrong} does not exist: there are {self.count}, from 0")
        return rows


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
