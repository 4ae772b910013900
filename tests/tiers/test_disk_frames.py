"""Framed over a disk tier with a damaged file: a load returns a miss or the right bytes."""

import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.framed import HEADER_NBYTES, Framed, frame_nbytes
from tests.support.disk_tiers import capacity_for
from tests.support.frames import BLOCK_NBYTES, CODEC_OFFSET, Codec, get, kv_like_block, put
from tests.tiers.test_framed_damage import (
    CHECKSUM_OFFSET,
    ELEMENT_OFFSET,
    FILL_OFFSET,
    PAYLOAD_OFFSET,
    SIZE_OFFSET,
    VERSION_OFFSET,
)

NBYTES = BLOCK_NBYTES - 100  # leaves padding in the last page
SLOT = frame_nbytes(NBYTES)
MIDDLE, END = HEADER_NBYTES + NBYTES // 2, HEADER_NBYTES + NBYTES
EDGES = (
    0, VERSION_OFFSET, CODEC_OFFSET, ELEMENT_OFFSET, SIZE_OFFSET, PAYLOAD_OFFSET, CHECKSUM_OFFSET,
    FILL_OFFSET, HEADER_NBYTES, HEADER_NBYTES + 8, MIDDLE, MIDDLE + 8, END - 8, END, SLOT,
)  # fmt: skip
REGIONS = tuple(pairwise(EDGES))
KEYS = keys_of("framed", 3)
BLOCKS = [kv_like_block(NBYTES, seed) for seed in range(3)]


class FramedDisk:
    """Three framed blocks on a disk; tests damage the second one in the file."""

    def __init__(self, path: Path, codec: Codec) -> None:
        self._path, self._codec = path, codec
        self.tier = self._opened()
        for key, block in zip(KEYS, BLOCKS, strict=True):
            put(self.tier, key, block)
        [self._slot] = self.inner.index.pin(KEYS[1:2])
        self.inner.index.unpin([self._slot])
        self.frame = self.read()
        payload = self.frame[PAYLOAD_OFFSET:CHECKSUM_OFFSET]
        self.used_nbytes = frame_nbytes(int.from_bytes(payload, "little"))  # of the slot

    def _opened(self) -> Framed:
        inner = DiskTier(block_nbytes=SLOT, path=str(self._path), capacity=capacity_for(3, SLOT))
        return Framed(inner, block_nbytes=NBYTES, codec=self._codec)

    @property
    def inner(self) -> DiskTier:
        return cast("DiskTier", self.tier.inner)

    def reopen(self) -> None:
        self.tier.close()
        self.tier = self._opened()

    def read(self) -> bytes:
        with (self._path / "blocks").open("rb") as blocks:
            blocks.seek(self._slot * SLOT)
            return blocks.read(SLOT)

    def write(self, at: int, data: bytes) -> None:
        with (self._path / "blocks").open("r+b") as blocks:
            blocks.seek(self._slot * SLOT + at)
            blocks.write(data)

    def truncate(self, at: int) -> None:
        os.truncate(self._path / "blocks", self._slot * SLOT + at)

    def check_missed_and_removed(self, rejected: int) -> None:
        """Check that the second block is a miss and removed, also after a restart."""
        before = self.tier.stats().rejected.total()
        assert get(self.tier, KEYS[1], NBYTES) is None
        assert self.tier.contains(KEYS) == [True, False, True]
        assert self.tier.stats().rejected.total() == before + rejected
        assert self.inner.index.pinned_slots == 0
        self.reopen()
        assert self.tier.contains(KEYS) == [True, False, True]

    def check_others(self) -> None:
        """Check that the other blocks are whole, and that the second one can be stored again."""
        for at in (0, 2):
            assert get(self.tier, KEYS[at], NBYTES) == BLOCKS[at]
        put(self.tier, KEYS[1], BLOCKS[1])
        assert get(self.tier, KEYS[1], NBYTES) == BLOCKS[1]


@pytest.fixture(params=["none", "zstd"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FramedDisk]:
    disk = FramedDisk(tmp_path, request.param)
    assert (disk.used_nbytes < SLOT) == (request.param == "zstd")
    yield disk
    disk.tier.close()


@pytest.mark.parametrize(("first", "end"), REGIONS)
def test_framed_load_of_frame_changed_on_disk_misses(
    disk: FramedDisk, first: int, end: int
) -> None:
    part, noise = disk.frame[first:end], random.Random(first)
    flipped = []
    for at, bit in ((0, 0), (0, 7), (len(part) // 2, 3), (len(part) - 1, 7)):
        changed = bytearray(part)
        changed[at] ^= 1 << bit
        flipped.append(bytes(changed))
    zeros, ones = bytes(len(part)), b"\xff" * len(part)
    for bad in (*flipped, zeros, ones, noise.randbytes(len(part))):
        disk.write(first, bad)
        if disk.read()[: disk.used_nbytes] != disk.frame[: disk.used_nbytes]:
            disk.check_missed_and_removed(rejected=1)
        else:
            assert get(disk.tier, KEYS[1], NBYTES) == BLOCKS[1]
            disk.tier.remove(KEYS[1:2])
        disk.check_others()
        assert disk.read()[: disk.used_nbytes] == disk.frame[: disk.used_nbytes]


@pytest.mark.parametrize("edge", EDGES)
def test_framed_load_from_file_cut_while_open_misses(disk: FramedDisk, edge: int) -> None:
    disk.truncate(edge)
    if edge < disk.used_nbytes:
        assert get(disk.tier, KEYS[1], NBYTES) is None
    else:
        assert get(disk.tier, KEYS[1], NBYTES) == BLOCKS[1]
        disk.tier.remove(KEYS[1:2])
    assert get(disk.tier, KEYS[0], NBYTES) == BLOCKS[0]
    assert get(disk.tier, KEYS[2], NBYTES) is None
    assert disk.tier.contains(KEYS) == [True, False, False]
    put(disk.tier, KEYS[2], BLOCKS[2])
    disk.check_others()


@pytest.mark.parametrize("edge", EDGES)
def test_framed_load_from_file_cut_while_closed_misses(disk: FramedDisk, edge: int) -> None:
    disk.tier.close()
    disk.truncate(edge)
    disk.reopen()
    assert disk.tier.contains(KEYS) == [True, edge == SLOT, False]
    assert get(disk.tier, KEYS[1], NBYTES) == (BLOCKS[1] if edge == SLOT else None)
    disk.tier.remove(KEYS[1:2])
    put(disk.tier, KEYS[2], BLOCKS[2])
    disk.check_others()


@pytest.mark.parametrize("edge", EDGES)
def test_framed_load_of_frame_with_zeroed_tail_misses(disk: FramedDisk, edge: int) -> None:
    """After a power cut a file can have its length, and parts that were never written."""
    disk.write(edge, bytes(SLOT - edge))
    if disk.frame[edge:].strip(b"\0"):
        disk.check_missed_and_removed(rejected=1)
    else:
        assert get(disk.tier, KEYS[1], NBYTES) == BLOCKS[1]
        disk.tier.remove(KEYS[1:2])
    disk.check_others()
