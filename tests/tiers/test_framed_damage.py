"""Only a frame that verifies comes back: any other is a counted miss, and removed."""

import random
import struct

import pytest

pytest.importorskip("zstandard")

import zstandard

from kvcache.testing import keys_of
from kvcache.tiers.framed import HEADER_NBYTES, PAGE, Framed, frame_nbytes
from kvcache.tiers.framed import format as frame_format
from tests.support.frames import (
    BLOCK,
    CODEC_AT,
    Codec,
    Frames,
    check_rejected,
    get,
    like_kv,
    of,
    put,
    views,
)

VERSION_AT, ELEMENT_AT, SIZE_AT, PAYLOAD_AT, CHECKSUM_AT, FILL_AT = 4, 7, 8, 16, 24, 40


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_no_byte_of_a_frame_can_change(codec: Codec) -> None:
    tier, inner, key, _ = of(codec)
    frame = inner.held[key]
    noise = random.Random(1)
    for at in range(len(frame)):
        bad = bytearray(frame)
        bad[at] ^= noise.randrange(1, 256)
        inner.held[key] = bytes(bad)
        assert get(tier, key) is None, f"byte {at} changed and nobody saw it"
        assert key not in inner.held, f"byte {at} changed and the frame stayed"
    assert tier.stats().rejected.total() == len(frame)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_no_bit_of_a_header_can_change(codec: Codec) -> None:
    tier, inner, key, _ = of(codec)
    frame = inner.held[key]
    for bit in range(8 * FILL_AT):
        bad = bytearray(frame)
        bad[bit // 8] ^= 1 << bit % 8
        inner.held[key] = bytes(bad)
        assert get(tier, key) is None, f"bit {bit} changed and nobody saw it"
        assert key not in inner.held


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_frame_can_be_neither_cut_nor_extended(codec: Codec) -> None:
    tier, inner, key, _ = of(codec)
    frame = inner.held[key]
    for length in range(1, len(frame)):
        inner.held[key] = frame[:length]
        assert get(tier, key) is None, f"cut at {length} and nobody saw it"
        assert key not in inner.held
    longest = frame_nbytes(BLOCK)
    for length in {len(frame) + 1, len(frame) + PAGE, longest + 1, longest + PAGE, 1 << 40}:
        inner.held[key] = frame + bytes(min(length, 2 * longest) - len(frame))
        assert get(tier, key) is None, f"extended to {length} and nobody saw it"
        assert key not in inner.held
    assert set(tier.stats().rejected) == {"length"}


def test_a_frame_under_another_key_is_a_miss() -> None:
    tier, inner, one, block = of("none")
    [two] = keys_of("two", 1)
    put(tier, two, like_kv(BLOCK, seed=2))
    inner.held[one], inner.held[two] = inner.held[two], inner.held[one]
    for key in (one, two):
        check_rejected(tier, inner, key, inner.held[key], "checksum")
    put(tier, one, block)  # what was removed can be written again
    assert get(tier, one) == block


def test_the_key_is_verified_also_when_the_bytes_are_equal() -> None:
    tier, inner, key, _ = of("none")
    frame = inner.held[key]
    for other in (key + b"\0", key[:-1], b"", key[::-1]):
        check_rejected(tier, inner, other, frame, "checksum")


def test_a_byte_cannot_move_from_the_block_to_the_key() -> None:
    tier, inner, _, block = of("none")
    [moved] = keys_of("moved", 1)
    inner.held.clear()
    put(tier, moved, block[:-1] + b"\0")
    frame = bytearray(inner.held[moved])
    frame[SIZE_AT : SIZE_AT + 16] = struct.pack("<QQ", BLOCK - 1, BLOCK - 1)
    check_rejected(tier, inner, b"\0" + moved, bytes(frame), "checksum")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_parts_that_swap_places_are_seen(codec: Codec) -> None:
    tier, inner, key, _ = of(codec)
    frame = inner.held[key]
    one, two = slice(HEADER_NBYTES, 2 * PAGE), slice(2 * PAGE, 3 * PAGE)
    bad = bytearray(frame)
    bad[one], bad[two] = frame[two], frame[one]
    check_rejected(tier, inner, key, bytes(bad), "checksum")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"LMCF", "magic"),
        (VERSION_AT, b"\0\0", "version"),
        (VERSION_AT, b"\2\0", "version"),
        (CODEC_AT, b"\1", "header"),
        (CODEC_AT, b"\7", "header"),
        (CODEC_AT, struct.pack("<BBQQ", 7, 2, BLOCK, PAGE), "header"),
        (ELEMENT_AT, b"\2", "header"),
        (SIZE_AT, struct.pack("<QQ", 2 * BLOCK, 2 * BLOCK), "size"),
        (SIZE_AT, struct.pack("<QQ", 2**64 - 1, 2**64 - 1), "size"),
        (SIZE_AT, struct.pack("<QQ", 0, 0), "size"),
        (SIZE_AT, struct.pack("<QQ", BLOCK - PAGE, BLOCK - PAGE), "length"),
        (SIZE_AT, struct.pack("<QQ", BLOCK - 1, BLOCK - 1), "padding"),
        (PAYLOAD_AT, struct.pack("<Q", BLOCK - 1), "header"),
        (CHECKSUM_AT, bytes(16), "checksum"),
        (FILL_AT, b"\1", "header"),
        (HEADER_NBYTES - 1, b"\1", "header"),
    ],
)
def test_why_a_frame_was_rejected(at: int, value: bytes, reason: str) -> None:
    tier, inner, key, _ = of("none")
    frame = bytearray(inner.held[key])
    frame[at : at + len(value)] = value
    check_rejected(tier, inner, key, bytes(frame), reason)


def compressed_frame(key: bytes, raw: bytes, stored: bytes, element: int = 2) -> bytes:
    """A zstd frame whose header and checksum are right, whatever `stored` is."""
    fields = struct.pack("<4sHBBQQ", b"KVCF", 1, frame_format.ZSTD, element, len(raw), len(stored))
    frame = fields + frame_format._digest(fields, memoryview(raw), key)
    return (frame.ljust(PAGE, b"\0") + stored).ljust(frame_nbytes(len(stored)), b"\0")


def test_what_zstd_cannot_read_is_rejected() -> None:
    tier, inner, key, block = of("zstd")
    low, high = block[0::2], block[1::2]
    shrink = zstandard.ZstdCompressor(level=1).compress
    good = shrink(high)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(high)
    inner.held[key] = compressed_frame(key, block, low + good)
    assert get(tier, key) == block
    for bad in (b"", b"no zstd", good[:-1], good + b"\0", good + good, shrink(high[1:]), unsized):
        frame = compressed_frame(key, block, low + bad)
        check_rejected(tier, inner, key, frame, "decompression")
    check_rejected(tier, inner, key, compressed_frame(key, block, low[:9]), "decompression")
    check_rejected(tier, inner, key, compressed_frame(key, block, low + good, 255), "decompression")
    check_rejected(tier, inner, key, compressed_frame(key, block, low + good, 0), "header")
    other = shrink(bytes(len(high)))
    check_rejected(tier, inner, key, compressed_frame(key, block, low + other), "checksum")


def test_a_bomb_is_not_unpacked() -> None:
    """Data that says it grows to a terabyte is refused before any room is made for it."""
    tier, inner, key, block = of("zstd")
    # Magic; a descriptor for a single segment with 8 bytes of content size; that size; no block.
    bomb = struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 40) + b"\1\0\0"
    assert zstandard.frame_content_size(bomb) == 1 << 40
    check_rejected(
        tier, inner, key, compressed_frame(key, block, block[0::2] + bomb), "decompression"
    )


def test_a_block_larger_than_the_buffer_is_a_miss() -> None:
    for codec in ("none", "zstd"):
        tier, inner, key, _ = of(codec)
        assert get(tier, key, BLOCK - 1) is None
        assert tier.stats().rejected == {"size": 1}
        assert key not in inner.held


def test_a_block_larger_than_the_tiers_own_is_a_miss_whatever_the_buffer() -> None:
    tier, inner, key, _ = of("zstd")
    large = bytes(4 * BLOCK)
    stored = zstandard.ZstdCompressor().compress(large)
    inner.held[key] = compressed_frame(key, large, stored, element=1)
    assert get(tier, key, len(large)) is None
    assert tier.stats().rejected == {"size": 1}


def test_one_bad_frame_costs_one_block() -> None:
    inner = Frames()
    tier = Framed(inner, block_nbytes=BLOCK, codec="zstd")
    keys = keys_of("batch", 5)
    blocks = [like_kv(BLOCK, seed) for seed in range(5)]
    assert tier.store(keys[:4], views(blocks[:4])) == [True] * 4
    inner.held[keys[1]] = inner.held[keys[2]]
    into = [bytearray(BLOCK) for _ in keys]
    written = tier.load([*keys, keys[1]], [*views(into), memoryview(bytearray(BLOCK))])
    assert written == [BLOCK, 0, BLOCK, BLOCK, 0, 0]
    for at in (0, 2, 3):
        assert into[at] == blocks[at]
    assert into[1] == bytes(BLOCK)
    assert tier.contains(keys) == [True, False, True, True, False]
