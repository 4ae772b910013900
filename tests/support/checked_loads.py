"""Blocks for a tier under faults, and loads that check each byte of the caller's buffers."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.testing import block_of
from kvcache.tier import Tier

NBYTES = 64 << 10
CLEAN = b"\xa5" * NBYTES
"""What a buffer has before a load, and still after a miss."""


def blocks(keys: Sequence[bytes]) -> list[memoryview]:
    """Return the block of each key."""
    return [memoryview(block_of(key, NBYTES)) for key in keys]


def loaded(tier: Tier, keys: Sequence[bytes]) -> list[bool]:
    """Load; return which are hits. Checks their bytes, and that a miss writes nothing."""
    into = [bytearray(CLEAN) for _ in keys]
    written = tier.load(keys, [memoryview(buffer) for buffer in into])
    for key, nbytes, buffer in zip(keys, written, into, strict=True):
        assert nbytes in (0, NBYTES)
        assert buffer == (block_of(key, NBYTES) if nbytes else CLEAN)
    return [bool(nbytes) for nbytes in written]
