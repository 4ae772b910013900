"""An inner tier that keeps frames in a dict, where a test can damage them, and blocks like KV."""

import random
from collections.abc import Sequence
from typing import Literal

from kvcache.testing import keys_of
from kvcache.tier import Tier
from kvcache.tiers.framed import PAGE, Framed

Codec = Literal["none", "zstd"]
BLOCK_NBYTES = 6 * PAGE
CODEC_OFFSET = 6  # of the codec, in a frame


class DictTier(Tier):
    """A tier that keeps values in a dict.

    Attributes:
        values: the values, by key.
        max_call_nbytes: the most memory that one call passed.
        close_calls: how often ``close`` was called.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.max_call_nbytes = 0
        self.close_calls = 0

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.values for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        self.max_call_nbytes = max(self.max_call_nbytes, sum(map(len, into)))
        written = []
        for key, buffer in zip(keys, into, strict=True):
            value = self.values.get(key, b"")
            buffer[: len(value)] = value[: len(buffer)]
            written.append(len(value))
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.max_call_nbytes = max(self.max_call_nbytes, sum(map(len, blocks)))
        for key, block in zip(keys, blocks, strict=True):
            self.values.setdefault(key, bytes(block))
        return [True] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.values.pop(key, None)

    def close(self) -> None:
        self.close_calls += 1


def kv_like_block(nbytes: int, seed: int = 0) -> bytes:
    """Return 16-bit floats with few different high bytes, and noise in the low bytes."""
    noise = random.Random(seed)
    block = bytearray(noise.randbytes(nbytes))
    block[1::2] = bytes(noise.choices((0x3F, 0xBF, 0x3E, 0xBE), k=nbytes // 2))
    return bytes(block)


def views(buffers: Sequence[bytes | bytearray]) -> list[memoryview]:
    return [memoryview(buffer) for buffer in buffers]


def put(tier: Tier, key: bytes, block: bytes | bytearray) -> None:
    """Store one block."""
    assert tier.store([key], [memoryview(block)]) == [True]


def get(tier: Tier, key: bytes, nbytes: int = BLOCK_NBYTES) -> bytes | None:
    """Load one block; ``None`` for a miss. A miss must not have changed the buffer."""
    clean = b"\xa5" * nbytes
    buffer = bytearray(clean)
    [written] = tier.load([key], [memoryview(buffer)])
    assert buffer[written:] == clean[written:], "a miss wrote into the buffer"
    return bytes(buffer[:written]) if written else None


def framed_with_one_block(codec: Codec) -> tuple[Framed, DictTier, bytes, bytes]:
    """Return a tier that holds one block, its inner tier, the key, and the block."""
    inner = DictTier()
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES, codec=codec)
    [key], block = keys_of(f"one {codec}", 1), kv_like_block(BLOCK_NBYTES)
    put(tier, key, block)
    assert get(tier, key) == block
    return tier, inner, key, block


def check_rejected(tier: Framed, inner: DictTier, key: bytes, frame: bytes, *reasons: str) -> None:
    """Check that ``frame`` is a miss, counted under one of ``reasons``, and removed."""
    before = tier.stats()
    inner.values[key] = frame
    assert get(tier, key) is None
    assert key not in inner.values, "a bad frame stayed"
    after = tier.stats()
    new = after.rejected - before.rejected
    assert new.total() == 1
    assert set(new) <= set(reasons)
    assert after.verified_blocks == before.verified_blocks
    assert get(tier, key) is None
    assert tier.stats().rejected == after.rejected, "a plain miss was counted as rejected"
