"""How much of a model's KV cache fits where, and what it takes to bring it back.

Always true: sizes are of the node, all ranks together, unless their name says rank; what is said to
fit also leaves room for what keeping it costs.
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

INDEX_NBYTES = 512  # what a block's entry in the index takes; 330 to 380 were measured
TABLE_NBYTES = 8  # what a page of a slab takes in the page table of each process that maps it


@dataclass(frozen=True, slots=True)
class Blocks:
    """The size of a token and of a block."""

    rank_token_nbytes: int
    token_nbytes: int
    block_tokens: int
    block_nbytes: int
    slot_nbytes: int  # a block in L1: whole pages

    def in_memory(self, nbytes: int, ranks: int) -> int:
        """How many fit into so much memory, with the index and `ranks` + 1 page tables."""
        tables = (ranks + 1) * self.slot_nbytes // PAGE * TABLE_NBYTES
        return max(0, nbytes // (self.slot_nbytes + tables + INDEX_NBYTES))

    def on_disk(self, nbytes: int) -> int:
        """How many fit into so much of a disk, each in its frame and with its record."""
        from kvcache.tiers.disk.records import RECORD_NBYTES
        from kvcache.tiers.framed import frame_nbytes

        return nbytes // (frame_nbytes(self.block_nbytes) + RECORD_NBYTES)

    def prefixes(self, blocks: int, tokens: int) -> int:
        """How many prefixes of `tokens` are in so many blocks. Only full blocks are kept."""
        return blocks // max(1, tokens // self.block_tokens)


def blocks_of(model: Model, *, dtype_nbytes: int, ranks: int, block_tokens: int) -> Blocks:
    """Sizes for an engine of `ranks` tensor-parallel ranks; ValueError if there cannot be one."""
    rank = model.rank_elements(ranks) * dtype_nbytes
    block = rank * ranks * block_tokens
    return Blocks(rank, rank * ranks, block_tokens, block, slot_nbytes_for(block))


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
