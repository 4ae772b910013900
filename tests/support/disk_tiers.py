"""Disk tiers of a few slots, and blocks with bytes that depend on their keys."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcache.sizes import DiskSize
from kvcache.testing import block_of
from kvcache.tiers.disk import PAGE, DiskTier
from kvcache.tiers.disk.record_file import RECORD_NBYTES

RECORD_USED_NBYTES = 154  # of a record; the rest is zeros
FIXED_NBYTES = 3 * PAGE  # the lock, the geometry, the rest of the last page of records


def capacity_for(slots: int, slot_nbytes: int = PAGE) -> DiskSize:
    """The smallest capacity with ``slots`` slots."""
    return DiskSize(FIXED_NBYTES + slots * (slot_nbytes + RECORD_NBYTES))


def open_disk(path: Path, slots: int = 8, **options: Any) -> DiskTier:
    """Open a tier with slots of one page."""
    return DiskTier(block_nbytes=PAGE, path=str(path), capacity=capacity_for(slots), **options)


def require_attributes(folder: Path) -> None:
    """Skip the test if the file system keeps no extended attributes, which identify `blocks`."""
    try:
        os.setxattr(folder, "user.test", b"1")
    except OSError:
        pytest.skip("the file system keeps no extended attributes")


def blocks_of(keys: Sequence[bytes], nbytes: int = PAGE) -> list[memoryview]:
    """The blocks to store under ``keys``."""
    return [memoryview(block_of(key, nbytes)) for key in keys]


def load_hits(tier: DiskTier, keys: Sequence[bytes]) -> list[bool]:
    """Load ``keys``; return which are hits. Checks that a hit has the bytes of its key."""
    buffers = [bytearray(PAGE) for _ in keys]
    written = tier.load(keys, [memoryview(buffer) for buffer in buffers])
    for key, nbytes, buffer in zip(keys, written, buffers, strict=True):
        assert nbytes in (0, PAGE)
        assert not nbytes or buffer == block_of(key, PAGE)
    return [bool(nbytes) for nbytes in written]
