"""Copies where the engine's cache and the slots are both in this process's memory.

Invariant, besides those of `transfer.base`: a copy is done when the call returns.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from kvcache.thread_cpus import process_cpus, use_cpus

try:
    import numba
    import numpy as np

    from kvcache.connectors.transfer.base import (
        CompletedCopy,
        CopyGeometry,
        CopyRows,
        Integers,
        PageCopier,
        integers,
    )
    from kvcache.connectors.transfer.cpu_kernels import (
        CACHE_LINE,
        PREFETCH_NBYTES,
        compile_transpose,
        copy_run,
        memory_fence,
        piece_widths,
    )
    from kvcache.connectors.transfer.merged_runs import MergedRuns
except ImportError as error:
    raise ImportError(
        f"page copies on CPU need numba and numpy ({error}): pip install 'kvcache[torch]',"
        " or 'kvcache[vllm]', which has them too",
        name=error.name,
    ) from error

# The prefetch of short runs is this far ahead, rounded to whole runs. In canonical order, runs of
# 256 bytes to 2 KiB were gathered at 1.07 to 1.37 of one contiguous copy; with 4 KiB, at 0.99 to
# 1.02.
_SHORT_RUNS_PREFETCH_NBYTES = 8192

# Short runs are gathered in groups of so many. Relative to source order, this changed the gather of
# runs of 256 bytes from 0.56 to 0.87 of one contiguous copy if heads lie outside blocks and from
# 0.88 to 0.96 if not, and that of 1152 bytes (MLA) from 0.80 to 1.00.
_GROUP_RUNS = 128

MIN_SHARED_NBYTES = 2 << 20
"""The least bytes of a copy that several threads share. For fewer bytes, waking a second thread
costs more than it saves."""


class CpuCopier(PageCopier):
    """Copies by the CPU, in the order of the source addresses.

    A copy is divided into `threads` shares of equal bytes. The calling thread copies one share, and
    `threads - 1` threads of a pool the others.
    """

    def __init__(
        self,
        *geometries: CopyGeometry,
        threads: int = 1,
        copy_share: Callable[..., None] | None = None,
    ) -> None:
        """Prepare the copies.

        Args:
            geometries: of the blocks, one for each kind.
            threads: how many threads share a copy.
            copy_share: a replacement for the compiled function, for tests.
        """
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        super().__init__(*geometries)
        self._sorted_runs = [_SortedRuns(geometry, copy_share) for geometry in geometries]
        self._threads = threads
        # The pool starts its threads with their first share, so none if `threads` is 1.
        self._pool = ThreadPoolExecutor(
            max(1, threads - 1), "kvcache-pages", use_cpus, (process_cpus(),)
        )

    def close(self) -> None:
        super().close()
        self._pool.shutdown()

    def _gather(self, rows: Sequence[CopyRows]) -> CompletedCopy:
        begin = time.perf_counter()
        for row in rows:
            runs = self._sorted_runs[row.geometry]
            self._copy(runs, row.slots, row.blocks, *runs.gather)
        return CompletedCopy(time.perf_counter() - begin)

    def _scatter(self, rows: Sequence[CopyRows], *_options: object) -> CompletedCopy:
        begin = time.perf_counter()
        for row in rows:
            runs = self._sorted_runs[row.geometry]
            self._copy(runs, row.blocks, row.slots, *runs.scatter)
        return CompletedCopy(time.perf_counter() - begin)

    def _copy(self, runs: _SortedRuns, *arguments: Integers) -> None:
        """Copy. The arguments are those of `copy_share`, without the range of bytes."""
        total = len(arguments[0]) * runs.block_nbytes
        count = 1 if total < MIN_SHARED_NBYTES else self._threads
        own, *others = pairwise([total * cut // count for cut in range(count + 1)])
        submitted = [
            (self._pool.submit(runs.copy_share, *arguments, *share), share) for share in others
        ]
        runs.copy_share(*arguments, *own)
        for future, share in submitted:
            if future.cancel():  # no thread of the pool was free to begin it
                runs.copy_share(*arguments, *share)
            else:
                future.result()


class _SortedRuns:
    """The runs of a geometry as the arguments of `copy_share`, and the function that copies them.

    Attributes:
        gather: arguments of a copy into slots.
        scatter: arguments of a copy into pages.
        block_nbytes: bytes of a block.
    """

    _copy_share: Callable[..., None] | None

    def __init__(self, geometry: CopyGeometry, copy_share: Callable[..., None] | None) -> None:
        transposes = geometry.transposes
        gather = np.array(transposes, dtype=np.int64).reshape(len(transposes), 7)
        # The rows of one side are the columns of the other.
        scatter = gather[:, [0, 2, 1, 6, 5, 4, 3]]
        runs = geometry if transposes else MergedRuns(geometry)
        nbytes = gather[:, :3].prod(axis=1) if transposes else runs.nbytes
        sides = runs.slab, runs.engine
        self.gather = _columns(_gather_order(nbytes, *sides), nbytes, gather, *sides)
        by_slot = np.argsort(runs.slab[0], kind="stable")
        self.scatter = _columns(by_slot, nbytes, scatter, runs.engine, runs.slab)
        self.block_nbytes = int(nbytes.sum())
        self._widths = piece_widths(cell for cell, *_ in transposes)
        self._copy_share = copy_share
        if copy_share is None:
            compile_in_background(self._widths)

    @property
    def copy_share(self) -> Callable[..., None]:
        """The function that copies a share. Waits until it is compiled."""
        if self._copy_share is None:
            self._copy_share = compile_copy_share(self._widths)
        return self._copy_share


def _gather_order(
    nbytes: Integers, targets: tuple[Integers, Integers], sources: tuple[Integers, Integers]
) -> Integers:
    """Return the order in which runs are gathered: by source address, short runs in groups.

    The runs of a group are in the order of their targets, so that neighbours in a slot are written
    one after another. A scatter in such an order was slower.
    """
    by_source = np.argsort(sources[0], kind="stable")
    if nbytes.mean() >= PREFETCH_NBYTES:
        return by_source
    groups = np.empty_like(by_source)
    groups[by_source] = np.arange(len(by_source)) // _GROUP_RUNS
    in_groups: Integers = np.lexsort((targets[0], groups))
    return in_groups


def _columns(
    order: Integers,
    nbytes: Integers,
    transposes: Integers,
    targets: tuple[Integers, Integers],
    sources: tuple[Integers, Integers],
) -> tuple[Integers, ...]:
    """Return the columns of the runs of a copy in this order."""
    return (
        *(column[order] for column in (*targets, *sources, nbytes)),
        transposes[order] if len(transposes) else transposes,
    )


_compiling = threading.RLock()
"""Held while a function is compiled, so that it is compiled once. A fork waits for it: a child
would inherit numba's own lock, held by a thread that the child does not have."""

_compiling_threads: set[threading.Thread] = set()


def _wait_for_compilation() -> None:
    """Wait for all compilation, also what a thread has not begun yet, and hold off any other."""
    for thread in _compiling_threads - {threading.current_thread()}:
        thread.join()
    _compiling.acquire()


os.register_at_fork(
    before=_wait_for_compilation,
    after_in_parent=_compiling.release,
    after_in_child=_compiling.release,
)


def compile_in_background(widths: frozenset[int] = frozenset()) -> None:
    """Begin to compile the function of `compile_copy_share`, so that no copy waits for it."""

    def compile_on_any_cpu() -> None:
        try:
            use_cpus(process_cpus())
            compile_copy_share(widths)
        finally:
            _compiling_threads.discard(thread)

    if widths not in _compiled:
        # Not a daemon: the process would end in the middle of LLVM's work.
        thread = threading.Thread(target=compile_on_any_cpu, name="kvcache-compile", daemon=False)
        thread.start()
        _compiling_threads.add(thread)


_compiled: dict[frozenset[int], Callable[..., None]] = {}


def compile_copy_share(widths: frozenset[int]) -> Callable[..., None]:
    """Return the function that copies a share, compiled now or earlier.

    It is machine code that runs without the GIL. `widths` are the `piece_widths` of transposed
    runs; without any, runs are copied as they are.
    """
    with _compiling:
        if widths not in _compiled:
            _compiled[widths] = _compile_copy_share(widths)
        return _compiled[widths]


def _compile_copy_share(widths: frozenset[int]) -> Callable[..., None]:
    """Compile the function that copies a share.

    It transposes all runs if there are `widths` (`piece_widths`), and none otherwise. Compiling
    takes a fifth of a second without transposes, and 1 to 2 s with them.

    Not `parallel`: of numba's threading layers some are unsafe under concurrent callers, and the
    others belong to the engine. Not cached on disk: that needs a folder that can be written.
    """
    transposed = bool(widths)
    transpose_run = compile_transpose(widths)

    def copy_share(
        targets: Integers,
        sources: Integers,
        target_addresses: Integers,
        target_strides: Integers,
        source_addresses: Integers,
        source_strides: Integers,
        nbytes: Integers,
        transposes: Integers,
        begin: int,
        end: int,
    ) -> None:
        """Copy bytes [begin, end) of all rows, of which each has all runs, one after another.

        A run that is transposed is copied whole, in the share that has its first byte.
        """
        runs, row_nbytes = nbytes.size, nbytes.sum()
        if transposed:
            scratch = np.empty(nbytes.max() + CACHE_LINE, dtype=np.uint8)
        # How many runs ahead the prefetch is.
        distance = min(max(_SHORT_RUNS_PREFETCH_NBYTES * runs // row_nbytes, 1), runs)
        for row in range(begin // row_nbytes, min(-(-end // row_nbytes), targets.size)):
            at = row * row_nbytes
            for run in range(runs):
                ahead, ahead_row = run + distance, row
                if ahead >= runs:
                    ahead, ahead_row = ahead - runs, min(row + 1, sources.size - 1)
                next_source = source_addresses[ahead] + sources[ahead_row] * source_strides[ahead]
                target = target_addresses[run] + targets[row] * target_strides[run]
                source = source_addresses[run] + sources[row] * source_strides[run]
                if transposed:
                    if begin <= at < end:
                        transpose_run(target, source, transposes[run], scratch, next_source)
                else:
                    first = max(begin - at, 0)
                    last = min(end - at, nbytes[run])
                    if first < last:
                        copy_run(target + first, source + first, last - first, next_source)
                at += nbytes[run]
        memory_fence()

    array, integer = numba.int64[::1], numba.int64
    signature = numba.void(*[array] * 7, numba.int64[:, ::1], integer, integer)
    compiled: Callable[..., None] = numba.njit(signature, nogil=True)(copy_share)
    # The first call resolves the signature, which takes milliseconds.
    compiled(*[integers([])] * 6, integers([1]), np.empty((0, 7), dtype=np.int64), 0, 0)
    return compiled
