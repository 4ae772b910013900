"""Frames on a real disk, damaged there: each is a miss or the right bytes, and then it is gone."""

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
from tests.support.frames import BLOCK, CODEC_AT, Codec, get, like_kv, put
from tests.tiers.test_disk import capacity
from tests.tiers.test_framed_damage import (
    CHECKSUM_AT,
    ELEMENT_AT,
    FILL_AT,
    PAYLOAD_AT,
    SIZE_AT,
    VERSION_AT,
)

NBYTES = BLOCK - 100  # so that there is padding
SLOT = frame_nbytes(NBYTES)
MIDDLE, END = HEADER_NBYTES + NBYTES // 2, HEADER_NBYTES + NBYTES
EDGES = (
    0, VERSION_AT, CODEC_AT, ELEMENT_AT, SIZE_AT, PAYLOAD_AT, CHECKSUM_AT, FILL_AT, HEADER_NBYTES,
    HEADER_NBYTES + 8, MIDDLE, MIDDLE + 8, END - 8, END, SLOT,
)  # fmt: skip
REGIONS = tuple(pairwise(EDGES))
KEYS = keys_of("framed", 3)
BLOCKS = [like_kv(NBYTES, seed) for seed in range(3)]


class Disk:
    """Three framed blocks, of which the second is damaged, in the file itself."""

    def __init__(self, path: Path, codec: Codec) -> None:
        self._path, self._codec = path, codec
        self.tier = self._opened()
        for key, block in zip(KEYS, BLOCKS, strict=True):
            put(self.tier, key, block)
        [self._slot] = self.inner._index.pin(KEYS[1:2])
        self.inner._index.unpin([self._slot])
        self.frame = self.read()
        payload = self.frame[PAYLOAD_AT:CHECKSUM_AT]
        self.used = frame_nbytes(int.from_bytes(payload, "little"))  # of the slot, by the frame

    def _opened(self) -> Framed:
        inner = DiskTier(block_nbytes=SLOT, path=str(self._path), capacity=capacity(3, SLOT))
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

    def check_gone(self, rejected: int) -> None:
        """The block was a miss, counted as ``rejected``, and is gone for good."""
        before = self.tier.stats().rejected.total()
        assert get(self.tier, KEYS[1], NBYTES) is None
        assert self.tier.contains(KEYS) == [True, False, True]
        assert self.tier.stats().rejected.total() == before + rejected
        assert self.inner._index.pinned_slots == 0
        self.reopen()
        assert self.tier.contains(KEYS) == [True, False, True]

    def check_others(self) -> None:
        """The blocks beside it are whole, and it can be stored again."""
        for at in (0, 2):
            assert get(self.tier, KEYS[at], NBYTES) == BLOCKS[at]
        put(self.tier, KEYS[1], BLOCKS[1])
        assert get(self.tier, KEYS[1], NBYTES) == BLOCKS[1]


@pytest.fixture(params=["none", "zstd"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    made = Disk(tmp_path, request.param)
    assert (made.used < SLOT) == (request.param == "zstd")
    yield made
    made.tier.close()


@pytest.mark.parametrize(("first", "end"), REGIONS)
def test_a_frame_that_was_changed_on_disk(disk: Disk, first: int, end: int) -> None:
    part, noise = disk.frame[first:end], random.Random(first)
    flipped = []
    for at, bit in ((0, 0), (0, 7), (len(part) // 2, 3), (len(part) - 1, 7)):
        one = bytearray(part)
        one[at] ^= 1 << bit
        flipped.append(bytes(one))
    zeros, ones = bytes(len(part)), b"\xff" * len(part)
    for bad in (*flipped, zeros, ones, noise.randbytes(len(part))):
        disk.write(first, bad)
        if disk.read()[: disk.used] != disk.frame[: disk.used]:
            disk.check_gone(rejected=1)
        else:
            assert get(disk.tier, KEYS[1], NBYTES) == BLOCKS[1]
            disk.tier.remove(KEYS[1:2])
        disk.check_others()
        assert disk.read()[: disk.used] == disk.frame[: disk.used]


@pytest.mark.parametrize("edge", EDGES)
def test_a_file_that_was_cut_inside_a_frame_while_it_is_open(disk: Disk, edge: int) -> None:
    disk.truncate(edge)
    if edge < disk.used:
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
def test_a_file_that_was_cut_between_two_starts(disk: Disk, edge: int) -> None:
    disk.tier.close()
    disk.truncate(edge)
    disk.reopen()
    assert disk.tier.contains(KEYS) == [True, edge == SLOT, False]
    assert get(disk.tier, KEYS[1], NBYTES) == (BLOCKS[1] if edge == SLOT else None)
    disk.tier.remove(KEYS[1:2])
    put(disk.tier, KEYS[2], BLOCKS[2])
    disk.check_others()


@pytest.mark.parametrize("edge", EDGES)
def test_a_tail_of_zeros_in_place_of_a_frame_s(disk: Disk, edge: int) -> None:
    """As after a power cut: the file is as long as it was, and part of it was never written."""
    disk.write(edge, bytes(SLOT - edge))
    if disk.frame[edge:].strip(b"\0"):
        disk.check_gone(rejected=1)
    else:
        assert get(disk.tier, KEYS[1], NBYTES) == BLOCKS[1]
        disk.tier.remove(KEYS[1:2])
    disk.check_others()
