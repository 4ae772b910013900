"""What the tests of frames share: an inner tier in plain sight, blocks like KV, a tier with one.

The inner tier keeps frames in a dict, so that a test can damage what was stored.
"""

import random
from collections.abc import Sequence
from typing import Literal

from kvcache.testing import keys_of
from kvcache.tier import Tier
from kvcache.tiers.framed import PAGE, Framed

Codec = Literal["none", "zstd"]
BLOCK = 6 * PAGE
CODEC_AT = 6


class Frames(Tier):
    """The inner tier: frames in a dict, in plain sight."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.handed = 0  # the most memory that one call brought
        self.closed = 0

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.held for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        self.handed = max(self.handed, sum(map(len, into)))
        written = []
        for key, buffer in zip(keys, into, strict=True):
            frame = self.held.get(key, b"")
            buffer[: len(frame)] = frame[: len(buffer)]
            written.append(len(frame))
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.handed = max(self.handed, sum(map(len, blocks)))
        for key, block in zip(keys, blocks, strict=True):
            self.held.setdefault(key, bytes(block))
        return [True] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        self.closed += 1


def like_kv(nbytes: int, seed: int = 0) -> bytes:
    """16-bit floats whose high bytes are few and whose low bytes are noise."""
    noise = random.Random(seed)
    block = bytearray(noise.randbytes(nbytes))
    block[1::2] = bytes(noise.choices((0x3F, 0xBF, 0x3E, 0xBE), k=nbytes // 2))
    return bytes(block)


def views(buffers: Sequence[bytes | bytearray]) -> list[memoryview]:
    return [memoryview(buffer) for buffer in buffers]


def put(tier: Tier, key: bytes, block: bytes | bytearray) -> None:
    assert tier.store([key], [memoryview(block)]) == [True]


def get(tier: Tier, key: bytes, nbytes: int = BLOCK) -> bytes | None:
    """The block, or None for a miss; a miss must not have touched the buffer."""
    clean = b"\xa5" * nbytes
    buffer = bytearray(clean)
    [written] = tier.load([key], [memoryview(buffer)])
    assert buffer[written:] == clean[written:], "a miss wrote into the buffer"
    return bytes(buffer[:written]) if written else None


def of(codec: Codec) -> tuple[Framed, Frames, bytes, bytes]:
    """A tier that holds one block of 6 pages; its frames; the key; the block."""
    inner = Frames()
    tier = Framed(inner, block_nbytes=BLOCK, codec=codec)
    [key], block = keys_of(f"one {codec}", 1), like_kv(BLOCK)
    put(tier, key, block)
    assert get(tier, key) == block
    return tier, inner, key, block


def check_rejected(tier: Framed, inner: Frames, key: bytes, frame: bytes, *reasons: str) -> None:
    """`frame` under `key` is a miss, counted under one of `reasons`, and removed."""
    before = tier.stats()
    inner.held[key] = frame
    assert get(tier, key) is None
    assert key not in inner.held, "a bad frame stayed"
    after = tier.stats()
    new = after.rejected - before.rejected
    assert new.total() == 1
    assert set(new) <= set(reasons)
    assert after.verified_blocks == before.verified_blocks
    assert get(tier, key) is None
    assert tier.stats().rejected == after.rejected, "a plain miss was counted as rejected"
