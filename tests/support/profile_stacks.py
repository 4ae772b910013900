"""Blocks in stacks of a shipped profile with a tier that engines share: store, load, check."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.profiles import open_stack
from kvcache.stack import Stack
from kvcache.testing import block_of, keys_of

NBYTES = 32 << 10
KEYS = keys_of("chain", 20)
NAMESPACE = keys_of("namespace", 1)[0]


def opened_stack(profile: str, namespace: bytes) -> Stack:
    """Open a stack; return when all memory of its L1 is there."""
    stack = open_stack(profile, block_nbytes=NBYTES, namespace=namespace)
    stack.front.slab.wait_populated()
    return stack


def store(stack: Stack, keys: Sequence[bytes] = KEYS, flush_s: float = 30) -> None:
    """Store the blocks of ``keys``, and wait until they are written below L1."""
    with stack.reserve(keys) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, NBYTES)
    assert stack.flush(flush_s)


def load_prefix(stack: Stack, keys: Sequence[bytes] = KEYS) -> int:
    """Load the longest prefix; check its bytes; return its blocks."""
    with stack.fetch(stack.match(keys).result()).result() as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(key, NBYTES), "the bytes of another block"
        return len(lease)


def check(stack: Stack, offered: int) -> None:
    """Check that nothing is in flight, and that every offered block is counted."""
    stats = stack.stats()
    assert stats.pinned_slots == 0
    for lower in stats.lower:
        kept = lower.stored_blocks + lower.known_blocks
        assert kept + lower.declined_blocks + lower.dropped_blocks == offered
