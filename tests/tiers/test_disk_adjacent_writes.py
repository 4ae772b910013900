"""DiskTier stores aligned blocks in adjacent slots with one write."""

import mmap
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import block_of, keys_of
from kvcache.tiers.disk import PAGE
from kvcache.tiers.disk.adjacent_writes import group_adjacent
from kvcache.tiers.disk.record_file import Record
from tests.support.disk_tiers import blocks_of, load_hits, open_disk


def aligned_blocks(keys: Sequence[bytes]) -> list[memoryview]:
    """The blocks of ``keys``, each in a page of one mapping."""
    memory = memoryview(mmap.mmap(-1, len(keys) * PAGE))
    for at, key in enumerate(keys):
        memory[at * PAGE : (at + 1) * PAGE] = block_of(key, PAGE)
    return [memory[at * PAGE : (at + 1) * PAGE] for at in range(len(keys))]


class WriteRecorder:
    """Records how many buffers each write of blocks has; fails while ``fails`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[int] = []
        self.fails = False
        self._real = os.pwritev
        monkeypatch.setattr(os, "pwritev", self._write)

    def _write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.buffers.append(len(buffers))
        written = self._real(fd, buffers, offset)
        return written - 1 if self.fails else written


@pytest.mark.parametrize("chains", [["new"], ["old", "new"]], ids=["free slots", "evicted blocks"])
def test_disk_stores_adjacent_slots_with_one_write(
    chains: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = WriteRecorder(monkeypatch)
    with closing(open_disk(tmp_path)) as tier:
        for chain in chains:
            keys = keys_of(chain, 8)
            assert tier.store(keys, aligned_blocks(keys)) == [True] * 8
        assert writes.buffers == [8] * len(chains)
        assert load_hits(tier, keys) == [True] * 8
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [True] * 8


def test_disk_declines_all_blocks_of_a_short_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = WriteRecorder(monkeypatch)
    keys = keys_of("chain", 8)
    with closing(open_disk(tmp_path)) as tier:
        writes.fails = True
        assert tier.store(keys, aligned_blocks(keys)) == [False] * 8
        tier.index.check()
        assert tier.index.free_slots == 8
        writes.fails = False
        assert tier.store(keys, aligned_blocks(keys)) == [True] * 8
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [True] * 8


def slots_of(
    slots: Sequence[int], blocks: Sequence[memoryview], slot_nbytes: int
) -> list[list[int]]:
    records = [Record(1, slot, PAGE, b"%d" % slot, b"") for slot in slots]
    groups = group_adjacent(records, blocks, slot_nbytes)
    return [[record.slot for record in group.records] for group in groups]


def test_group_adjacent_separates_what_one_write_cannot_have() -> None:
    keys = keys_of("a", 5)
    whole = aligned_blocks(keys)
    assert slots_of([4, 0, 2, 1, 9], whole, PAGE) == [[0, 1, 2], [4], [9]]
    assert slots_of([0, 1, 2, 3, 4], whole, 2 * PAGE) == [[0], [1], [2], [3], [4]]  # half a slot
    unaligned = blocks_of(keys)
    assert slots_of([0, 1, 2], [whole[0], unaligned[1], whole[2]], PAGE) == [[0], [1], [2]]
    many = aligned_blocks(keys_of("b", 600))
    assert list(map(len, slots_of(range(600), many, PAGE))) == [512, 88]
