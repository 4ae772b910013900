"""Calculate how many blocks of a model fit into memory or a disk, and measure a memory copy.

Always true: sizes are for the node, all ranks together, unless their name contains "rank". A number
of blocks that fit leaves room for the index, page tables and records.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvcache.cli.plan.model import Model
from kvcache.slab import PAGE, slot_nbytes_for

INDEX_NBYTES = 512  # of a block's entry in the index; 330 to 380 were measured
TABLE_NBYTES = 8  # of a page's entry in the page table of each process that maps the slab


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """The sizes of a token and of a block. A slot is a block in L1, in whole pages."""

    rank_token_nbytes: int
    token_nbytes: int
    block_tokens: int
    block_nbytes: int
    slot_nbytes: int

    def in_memory(self, nbytes: int, ranks: int) -> int:
        """Return how many blocks fit into memory, with the index and `ranks` + 1 page tables."""
        table_nbytes = (ranks + 1) * self.slot_nbytes // PAGE * TABLE_NBYTES
        return max(0, nbytes // (self.slot_nbytes + table_nbytes + INDEX_NBYTES))

    def on_disk(self, nbytes: int) -> int:
        """Return how many blocks fit on a disk, each with its frame and its record."""
        from kvcache.tiers.disk.record_file import RECORD_NBYTES
        from kvcache.tiers.framed import frame_nbytes

        return nbytes // (frame_nbytes(self.block_nbytes) + RECORD_NBYTES)

    def prefixes(self, blocks: int, tokens: int) -> int:
        """Return how many prefixes of `tokens` fit into `blocks`; each has full blocks only."""
        return blocks // max(1, tokens // self.block_tokens)


def block_sizes(model: Model, *, dtype_nbytes: int, ranks: int, block_tokens: int) -> BlockSizes:
    """Return the sizes for an engine of `ranks` tensor-parallel ranks.

    Raises:
        ValueError: the model cannot be divided into `ranks`.
    """
    rank_token_nbytes = model.rank_elements(ranks) * dtype_nbytes
    token_nbytes = rank_token_nbytes * ranks
    block_nbytes = token_nbytes * block_tokens
    return BlockSizes(
        rank_token_nbytes, token_nbytes, block_tokens, block_nbytes, slot_nbytes_for(block_nbytes)
    )


def copy_rate(
    threads: int,
    nbytes: int = 128 << 20,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure a contiguous memory copy on this machine: bytes per second, the median of rounds."""
    import ctypes

    source, target = mmap.mmap(-1, nbytes), mmap.mmap(-1, nbytes)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in (target, source)]
    share = nbytes // threads

    def copy(part: int) -> None:
        to, of = (address + part * share for address in addresses)
        ctypes.memmove(to, of, share)  # releases the GIL, so the threads copy at the same time

    times: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            start = clock()
            list(pool.map(copy, range(threads)))
            times.append(clock() - start)
    del times[0]  # in the first round the kernel allocates the pages
    return share * threads / statistics.median(times)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
