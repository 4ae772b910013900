"""Calculate how many blocks of a model fit into memory or a disk, and measure a memory copy.

Invariants: sizes are for the node, all ranks together, unless their name contains "rank". Bytes
that several ranks hold alike count once. A number of slots that fit leaves room for the index, page
tables and records.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvcache.models import Model, ModelGroup
from kvcache.models.layers import alignment
from kvcache.parts import choose_parts
from kvcache.slab import PAGE, slot_nbytes_for

INDEX_NBYTES = 512  # of a block's entry in the index; 330 to 380 were measured
TABLE_NBYTES = 8  # of a page's entry in the page table of each process that maps the slab


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """The sizes of a model's blocks in one engine.

    A block of each kept group is cut into `parts`, and a part fills a slot of L1, which has
    whole pages.
    """

    groups: tuple[ModelGroup, ...]
    parts: tuple[int, ...]
    part_nbytes: int
    slot_nbytes: int
    align_tokens: int

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the first group."""
        return self.groups[0].block_tokens

    @property
    def token_nbytes(self) -> int:
        """Bytes of a token in all layers that keep something of every token."""
        return sum(group.block_nbytes // group.block_tokens for group in self._of_tokens())

    @property
    def rank_token_nbytes(self) -> int:
        """Bytes of a token on one rank."""
        return sum(group.rank_block_nbytes // group.block_tokens for group in self._of_tokens())

    def _of_tokens(self) -> list[ModelGroup]:
        return [group for group in self.groups if group.needs.kind != "state"]

    def resume_blocks(self, tokens: int) -> list[int]:
        """Return the blocks of each group that a request needs to resume after `tokens`."""
        end = tokens // self.align_tokens * self.align_tokens
        return [group.needed_blocks(end) for group in self.groups]

    def stored_blocks(self, tokens: int, chunk_tokens: int) -> list[int]:
        """Return the blocks of each group that an engine stores of a prompt.

        It computes the prompt in chunks of `chunk_tokens`, and stores states at their ends only.
        """
        stored = []
        for group in self.groups:
            step = group.block_tokens
            end = tokens // step * step
            if group.needs.kind == "state":
                step = max(step, chunk_tokens // step * step)
            # No request needs the last block of a chunk: after it, the next chunk begins.
            unused = end // group.needs.tokens if group.needs.kind == "chunk" else 0
            stored.append(-(-end // step) - unused)
        return stored

    def nbytes(self, blocks: Sequence[int]) -> int:
        """Return the bytes of a number of blocks of each group."""
        return sum(
            count * group.block_nbytes for count, group in zip(blocks, self.groups, strict=True)
        )

    def slots(self, blocks: Sequence[int]) -> int:
        """Return the slots of a number of blocks of each group."""
        return sum(count * parts for count, parts in zip(blocks, self.parts, strict=True))

    def in_memory(self, nbytes: int, ranks: int) -> int:
        """Return how many slots fit into memory, with the index and `ranks` + 1 page tables."""
        table_nbytes = (ranks + 1) * self.slot_nbytes // PAGE * TABLE_NBYTES
        return max(0, nbytes // (self.slot_nbytes + table_nbytes + INDEX_NBYTES))

    def on_disk(self, nbytes: int) -> int:
        """Return how many parts fit on a disk, each with its frame and its record."""
        from kvcache.tiers.disk.record_file import RECORD_NBYTES
        from kvcache.tiers.framed import frame_nbytes

        return nbytes // (frame_nbytes(self.part_nbytes) + RECORD_NBYTES)


def cache_sizes(model: Model, *, cache_nbytes: int, ranks: int, block_tokens: int) -> CacheSizes:
    """Return the sizes for an engine of `ranks` tensor-parallel ranks.

    Raises:
        ValueError: the model cannot be divided into `ranks`.
    """
    groups = model.groups(ranks=ranks, block_tokens=block_tokens, cache_nbytes=cache_nbytes)
    blocks = [group.block_nbytes for group in groups]
    parts = choose_parts(blocks)
    part = max(-(-nbytes // count) for nbytes, count in zip(blocks, parts, strict=True))
    return CacheSizes(groups, parts, part, slot_nbytes_for(part), alignment(groups))


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
