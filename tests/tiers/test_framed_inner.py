"""Inner tiers that fail, lie, or decline: the answer is a miss, a refusal, or their own error."""

from collections.abc import Sequence

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.framed import HEADER_NBYTES, PAGE, Framed, frame_nbytes
from kvcache.tiers.framed import tier as framed_tier
from tests.support.frames import BLOCK, Frames, get, like_kv, of, put


class Misbehaving(Frames):
    """Answers a load with `lengths`, in turn; raises what is no number."""

    def __init__(self, *lengths: int | Exception) -> None:
        super().__init__()
        self.lengths = list(lengths)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        super().load(keys, into)
        answer = self.lengths.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]


def test_lengths_that_are_not_the_frames_are_misses() -> None:
    whole = frame_nbytes(BLOCK)
    lengths = (-1, 1, HEADER_NBYTES, whole - PAGE, whole - 1, whole + 1, 1 << 60)
    inner = Misbehaving(*lengths)
    tier = Framed(inner, block_nbytes=BLOCK)
    [key] = keys_of("short", 1)
    for _ in lengths:
        put(tier, key, like_kv(BLOCK))
        assert get(tier, key) is None
        assert key not in inner.held
    assert tier.stats().rejected == {"length": len(lengths)}


def test_a_length_without_bytes_is_a_miss() -> None:
    """What lies in the scratch memory is then another key's frame, and a whole one."""
    tier, *_ = of("none")
    [other] = keys_of("not written", 1)
    tier.inner = Misbehaving(frame_nbytes(BLOCK))
    assert get(tier, other) is None
    assert tier.stats().rejected == {"checksum": 1}


def test_an_error_of_the_inner_tier_passes_and_leaves_the_desk() -> None:
    broken = OSError("the disk is gone")
    inner = Misbehaving(*[broken] * (2 * framed_tier._WORKSPACES), frame_nbytes(BLOCK))
    tier = Framed(inner, block_nbytes=BLOCK)
    [key] = keys_of("error", 1)
    put(tier, key, like_kv(BLOCK))
    for _ in range(2 * framed_tier._WORKSPACES):
        with pytest.raises(OSError, match="the disk is gone"):
            get(tier, key)
    assert get(tier, key) == like_kv(BLOCK)
    assert key in inner.held


def test_what_the_inner_tier_declines_is_declined() -> None:
    class Declines(Frames):
        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            taken = [key[0] % 2 == 0 for key in keys]
            kept = [at for at, take in enumerate(taken) if take]
            super().store([keys[at] for at in kept], [blocks[at] for at in kept])
            return taken

    tier = Framed(Declines(), block_nbytes=8)
    keys = [bytes([at]) for at in range(6)]
    assert tier.store(keys, [memoryview(bytes([at]) * 8) for at in range(6)]) == [True, False] * 3
    assert [get(tier, key, 8) for key in keys[:3]] == [bytes(8), None, b"\2" * 8]
    stats = tier.stats()
    assert (stats.stored_raw_blocks, stats.stored_raw_nbytes) == (3, 24)


def test_close_closes_the_inner_tier() -> None:
    inner = Frames()
    Framed(inner, block_nbytes=8).close()
    assert inner.closed == 1
