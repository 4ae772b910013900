"""Page copies where the engine's cache and the slots are both in this process's memory.

Always true here, beside what `copier` says: a copy is over when the call returns.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

try:
    import numba
    import numpy as np

    from kvcache.connectors.transfer.base import (
        CompletedCopy,
        CopyGeometry,
        Integers,
        PageCopier,
        integers,
    )
    from kvcache.connectors.transfer.cpu_kernels import LINE, copy_run, settle, turning, widths
except ImportError as error:
    raise ImportError(
        f"page copies on CPU need numba and numpy ({error}): pip install 'kvcache[torch]',"
        " or 'kvcache[vllm]', which has them too"
    ) from error

# Short runs are asked for this many bytes ahead, as whole runs: in canonical order those of 256
# bytes to 2 KiB were gathered at 0.99 to 1.02 of one contiguous copy with 4 KiB, and at 1.07 to
# 1.37 so.
_FAR = 8192

# Below this many bytes waking a second thread costs more than its share of the copy takes.
_ALONE_BELOW = 2 << 20


class CpuCopier(PageCopier):
    """Copies by the processor, reading in the order of addresses.

    Every copy is cut into `threads` shares of equal bytes, of which the calling thread copies one;
    `threads - 1` are started for the others.
    """

    def __init__(
        self, sides: CopyGeometry, *, turns: Sequence[Sequence[int]] = (), threads: int = 1
    ) -> None:
        """`turns` has of every run, where they are turned, what `turning` takes, for a gather."""
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        super().__init__(blocks=sides.blocks, slots=sides.slots)
        out = np.array(turns, dtype=np.int64).reshape(len(turns), 7)
        back = out[:, [0, 2, 1, 6, 5, 4, 3]]  # rows of the one side are columns of the other
        nbytes = out[:, :3].prod(axis=1) if turns else sides.nbytes
        self._out = _in_order(nbytes, out, sides.slab, sides.engine)
        self._back = _in_order(nbytes, back, sides.engine, sides.slab)
        self._block_nbytes = int(nbytes.sum())
        self._copy_share = _compiled(widths(turn[0] for turn in turns))
        self._threads = threads
        # Starts a thread when it is first given a share, so none where threads is 1.
        self._pool = ThreadPoolExecutor(
            max(1, threads - 1), "kvcache-pages", _may_run_on, (_cores(),)
        )

    def close(self) -> None:
        super().close()
        self._pool.shutdown()

    def _gather(self, blocks: Integers, slots: Integers) -> CompletedCopy:
        return self._copy(slots, blocks, *self._out)

    def _scatter(self, slots: Integers, blocks: Integers, *_when: object) -> CompletedCopy:
        return self._copy(blocks, slots, *self._back)

    def _copy(self, *what: Integers) -> CompletedCopy:
        """Targets, sources and their runs, as `_copy_share` takes them."""
        begun = time.perf_counter()
        total = len(what[0]) * self._block_nbytes
        shares = 1 if total < _ALONE_BELOW else self._threads
        own, *others = pairwise([total * cut // shares for cut in range(shares + 1)])
        lent = [(self._pool.submit(self._copy_share, *what, *share), share) for share in others]
        self._copy_share(*what, *own)
        for future, share in lent:
            if future.cancel():  # nobody has begun it, and this thread has nothing else to do
                self._copy_share(*what, *share)
            else:
                future.result()
        return CompletedCopy(time.perf_counter() - begun)


def _in_order(
    nbytes: Integers,
    turns: Integers,
    targets: tuple[Integers, Integers],
    sources: tuple[Integers, Integers],
) -> tuple[Integers, ...]:
    """The runs of a copy, those first that are read at lower addresses.

    Short runs in any other order were copied at two thirds of the speed.
    """
    order = np.argsort(sources[0], kind="stable")
    turned = turns[order] if len(turns) else turns
    return (*(column[order] for column in (*targets, *sources, nbytes)), turned)


def compile_kernels() -> None:
    """Have everything compiled that a copy needs, so that no request waits for it."""
    _compiled()


@cache
def _compiled(turned_by: frozenset[int] = frozenset()) -> Callable[..., None]:
    """What copies a share, as machine code that releases the GIL, ready before the first request.

    All runs are turned where `turned_by` has widths. That is a second or two of compiling.

    Not `parallel`: numba's own threads are not safe under concurrent callers, or are the engine's.
    Not cached on disk: a fifth of a second at start is cheaper than a folder that must be writable.
    """
    turned = bool(turned_by)
    turn_run = turning(turned_by)

    def copy_share(
        targets: Integers,
        sources: Integers,
        target_addresses: Integers,
        target_strides: Integers,
        source_addresses: Integers,
        source_strides: Integers,
        nbytes: Integers,
        turns: Integers,
        begin: int,
        end: int,
    ) -> None:
        """Copy bytes [begin, end) of the stream of all runs: run after run of row after row.

        What is turned is so as a whole, in the share that has its first byte.
        """
        runs, row_nbytes = nbytes.size, nbytes.sum()
        if turned:
            scratch = np.empty(nbytes.max() + LINE, dtype=np.uint8)
        far = min(max(_FAR * runs // row_nbytes, 1), runs)  # runs from here to what is asked for
        for row in range(begin // row_nbytes, min(-(-end // row_nbytes), targets.size)):
            at = row * row_nbytes
            for run in range(runs):
                after, row_after = run + far, row
                if after >= runs:
                    after, row_after = after - runs, min(row + 1, sources.size - 1)
                following = source_addresses[after] + sources[row_after] * source_strides[after]
                target = target_addresses[run] + targets[row] * target_strides[run]
                source = source_addresses[run] + sources[row] * source_strides[run]
                if turned:
                    if begin <= at < end:
                        turn_run(target, source, turns[run], scratch, following)
                else:
                    first = max(begin - at, 0)
                    last = min(end - at, nbytes[run])
                    if first < last:
                        copy_run(target + first, source + first, last - first, following)
                at += nbytes[run]
        settle()

    array, integer = numba.int64[::1], numba.int64
    signature = numba.void(*[array] * 7, numba.int64[:, ::1], integer, integer)
    compiled: Callable[..., None] = numba.njit(signature, nogil=True)(copy_share)
    # The first call looks the signature up, for milliseconds.
    compiled(*[integers([])] * 6, integers([1]), np.empty((0, 7), dtype=np.int64), 0, 0)
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
