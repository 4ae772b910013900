"""Framed over an inner tier that fails, returns wrong lengths, or declines."""

from collections.abc import Sequence

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.framed import HEADER_NBYTES, PAGE, Framed, frame_nbytes
from kvcache.tiers.framed import tier as framed_tier
from tests.support.frames import (
    BLOCK_NBYTES,
    DictTier,
    framed_with_one_block,
    get,
    kv_like_block,
    put,
)


class ScriptedLengthTier(DictTier):
    """Returns one of `lengths` for each load, in turn; raises it if it is an exception."""

    def __init__(self, *lengths: int | Exception) -> None:
        super().__init__()
        self.lengths = list(lengths)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        super().load(keys, into)
        answer = self.lengths.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]


def test_framed_load_with_wrong_length_misses_and_removes_the_block() -> None:
    frame_length = frame_nbytes(BLOCK_NBYTES)
    lengths = (
        -1,
        1,
        HEADER_NBYTES,
        frame_length - PAGE,
        frame_length - 1,
        frame_length + 1,
        1 << 60,
    )
    inner = ScriptedLengthTier(*lengths)
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES)
    [key] = keys_of("short", 1)
    for _ in lengths:
        put(tier, key, kv_like_block(BLOCK_NBYTES))
        assert get(tier, key) is None
        assert key not in inner.values
    assert tier.stats().rejected == {"length": len(lengths)}


def test_framed_load_with_right_length_but_no_bytes_misses() -> None:
    """The workspace then still contains the whole frame of another key."""
    tier, *_ = framed_with_one_block("none")
    [other] = keys_of("not written", 1)
    tier.inner = ScriptedLengthTier(frame_nbytes(BLOCK_NBYTES))
    assert get(tier, other) is None
    assert tier.stats().rejected == {"checksum": 1}


def test_framed_load_when_inner_tier_raises_passes_the_error_and_frees_the_workspace() -> None:
    error = OSError("the disk is gone")
    inner = ScriptedLengthTier(
        *[error] * (2 * framed_tier.MAX_CONCURRENT_CALLS), frame_nbytes(BLOCK_NBYTES)
    )
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES)
    [key] = keys_of("error", 1)
    put(tier, key, kv_like_block(BLOCK_NBYTES))
    for _ in range(2 * framed_tier.MAX_CONCURRENT_CALLS):
        with pytest.raises(OSError, match="the disk is gone"):
            get(tier, key)
    assert get(tier, key) == kv_like_block(BLOCK_NBYTES)
    assert key in inner.values


def test_framed_store_returns_what_the_inner_tier_declined() -> None:
    class DecliningTier(DictTier):
        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            accepted = [key[0] % 2 == 0 for key in keys]
            kept = [at for at, accept in enumerate(accepted) if accept]
            super().store([keys[at] for at in kept], [blocks[at] for at in kept])
            return accepted

    tier = Framed(DecliningTier(), block_nbytes=8)
    keys = [bytes([at]) for at in range(6)]
    assert tier.store(keys, [memoryview(bytes([at]) * 8) for at in range(6)]) == [True, False] * 3
    assert [get(tier, key, 8) for key in keys[:3]] == [bytes(8), None, b"\2" * 8]
    stats = tier.stats()
    assert (stats.stored_raw_blocks, stats.stored_raw_nbytes) == (3, 24)


def test_framed_close_closes_the_inner_tier() -> None:
    inner = DictTier()
    Framed(inner, block_nbytes=8).close()
    assert inner.close_calls == 1
