"""Framed: a damaged frame is a miss, counted by reason, and removed."""

import random
import struct

import pytest

pytest.importorskip("zstandard")

import zstandard

from kvcache.testing import keys_of
from kvcache.tiers.framed import HEADER_NBYTES, PAGE, Framed, frame_nbytes
from kvcache.tiers.framed import format as frame_format
from tests.support.frames import (
    BLOCK_NBYTES,
    CODEC_OFFSET,
    Codec,
    DictTier,
    check_rejected,
    framed_with_one_block,
    get,
    kv_like_block,
    put,
    views,
)

VERSION_OFFSET, ELEMENT_OFFSET, SIZE_OFFSET, PAYLOAD_OFFSET, CHECKSUM_OFFSET, FILL_OFFSET = (
    4,
    7,
    8,
    16,
    24,
    40,
)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_framed_load_of_frame_with_any_changed_byte_misses(codec: Codec) -> None:
    tier, inner, key, _ = framed_with_one_block(codec)
    frame = inner.values[key]
    noise = random.Random(1)
    for at in range(len(frame)):
        bad = bytearray(frame)
        bad[at] ^= noise.randrange(1, 256)
        inner.values[key] = bytes(bad)
        assert get(tier, key) is None, f"byte {at} changed and was not noticed"
        assert key not in inner.values, f"byte {at} changed and the frame stayed"
    assert tier.stats().rejected.total() == len(frame)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_framed_load_of_frame_with_any_changed_header_bit_misses(codec: Codec) -> None:
    tier, inner, key, _ = framed_with_one_block(codec)
    frame = inner.values[key]
    for bit in range(8 * FILL_OFFSET):
        bad = bytearray(frame)
        bad[bit // 8] ^= 1 << bit % 8
        inner.values[key] = bytes(bad)
        assert get(tier, key) is None, f"bit {bit} changed and was not noticed"
        assert key not in inner.values


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_framed_load_of_cut_or_extended_frame_misses(codec: Codec) -> None:
    tier, inner, key, _ = framed_with_one_block(codec)
    frame = inner.values[key]
    for length in range(1, len(frame)):
        inner.values[key] = frame[:length]
        assert get(tier, key) is None, f"cut at {length} and was not noticed"
        assert key not in inner.values
    longest = frame_nbytes(BLOCK_NBYTES)
    for length in {len(frame) + 1, len(frame) + PAGE, longest + 1, longest + PAGE, 1 << 40}:
        inner.values[key] = frame + bytes(min(length, 2 * longest) - len(frame))
        assert get(tier, key) is None, f"extended to {length} and was not noticed"
        assert key not in inner.values
    assert set(tier.stats().rejected) == {"length"}


def test_framed_load_of_frame_under_another_key_misses() -> None:
    tier, inner, one, block = framed_with_one_block("none")
    [two] = keys_of("two", 1)
    put(tier, two, kv_like_block(BLOCK_NBYTES, seed=2))
    inner.values[one], inner.values[two] = inner.values[two], inner.values[one]
    for key in (one, two):
        check_rejected(tier, inner, key, inner.values[key], "checksum")
    put(tier, one, block)  # a removed block can be stored again
    assert get(tier, one) == block


def test_framed_load_of_equal_bytes_under_another_key_misses() -> None:
    tier, inner, key, _ = framed_with_one_block("none")
    frame = inner.values[key]
    for other in (key + b"\0", key[:-1], b"", key[::-1]):
        check_rejected(tier, inner, other, frame, "checksum")


def test_framed_load_with_byte_moved_from_block_to_key_misses() -> None:
    tier, inner, _, block = framed_with_one_block("none")
    [moved] = keys_of("moved", 1)
    inner.values.clear()
    put(tier, moved, block[:-1] + b"\0")
    frame = bytearray(inner.values[moved])
    frame[SIZE_OFFSET : SIZE_OFFSET + 16] = struct.pack("<QQ", BLOCK_NBYTES - 1, BLOCK_NBYTES - 1)
    check_rejected(tier, inner, b"\0" + moved, bytes(frame), "checksum")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_framed_load_of_frame_with_swapped_pages_misses(codec: Codec) -> None:
    tier, inner, key, _ = framed_with_one_block(codec)
    frame = inner.values[key]
    first, second = slice(HEADER_NBYTES, 2 * PAGE), slice(2 * PAGE, 3 * PAGE)
    bad = bytearray(frame)
    bad[first], bad[second] = frame[second], frame[first]
    check_rejected(tier, inner, key, bytes(bad), "checksum")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"LMCF", "magic"),
        (VERSION_OFFSET, b"\0\0", "version"),
        (VERSION_OFFSET, b"\2\0", "version"),
        (CODEC_OFFSET, b"\1", "header"),
        (CODEC_OFFSET, b"\7", "header"),
        (CODEC_OFFSET, struct.pack("<BBQQ", 7, 2, BLOCK_NBYTES, PAGE), "header"),
        (ELEMENT_OFFSET, b"\2", "header"),
        (SIZE_OFFSET, struct.pack("<QQ", 2 * BLOCK_NBYTES, 2 * BLOCK_NBYTES), "size"),
        (SIZE_OFFSET, struct.pack("<QQ", 2**64 - 1, 2**64 - 1), "size"),
        (SIZE_OFFSET, struct.pack("<QQ", 0, 0), "size"),
        (SIZE_OFFSET, struct.pack("<QQ", BLOCK_NBYTES - PAGE, BLOCK_NBYTES - PAGE), "length"),
        (SIZE_OFFSET, struct.pack("<QQ", BLOCK_NBYTES - 1, BLOCK_NBYTES - 1), "padding"),
        (PAYLOAD_OFFSET, struct.pack("<Q", BLOCK_NBYTES - 1), "header"),
        (CHECKSUM_OFFSET, bytes(16), "checksum"),
        (FILL_OFFSET, b"\1", "header"),
        (HEADER_NBYTES - 1, b"\1", "header"),
    ],
)
def test_framed_load_of_damaged_frame_counts_the_reason(at: int, value: bytes, reason: str) -> None:
    tier, inner, key, _ = framed_with_one_block("none")
    frame = bytearray(inner.values[key])
    frame[at : at + len(value)] = value
    check_rejected(tier, inner, key, bytes(frame), reason)


def compressed_frame(key: bytes, raw: bytes, stored: bytes, element: int = 2) -> bytes:
    """Return a zstd frame with a valid header and checksum, whatever `stored` is."""
    fields = struct.pack("<4sHBBQQ", b"KVCF", 1, frame_format.ZSTD, element, len(raw), len(stored))
    frame = fields + frame_format.checksum(fields, memoryview(raw), key)
    return (frame.ljust(PAGE, b"\0") + stored).ljust(frame_nbytes(len(stored)), b"\0")


def test_framed_load_of_invalid_zstd_data_misses() -> None:
    tier, inner, key, block = framed_with_one_block("zstd")
    low, high = block[0::2], block[1::2]
    shrink = zstandard.ZstdCompressor(level=1).compress
    good = shrink(high)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(high)
    inner.values[key] = compressed_frame(key, block, low + good)
    assert get(tier, key) == block
    for bad in (b"", b"no zstd", good[:-1], good + b"\0", good + good, shrink(high[1:]), unsized):
        frame = compressed_frame(key, block, low + bad)
        check_rejected(tier, inner, key, frame, "decompression")
    check_rejected(tier, inner, key, compressed_frame(key, block, low[:9]), "decompression")
    check_rejected(tier, inner, key, compressed_frame(key, block, low + good, 255), "decompression")
    check_rejected(tier, inner, key, compressed_frame(key, block, low + good, 0), "header")
    other = shrink(bytes(len(high)))
    check_rejected(tier, inner, key, compressed_frame(key, block, low + other), "checksum")


def test_framed_load_of_decompression_bomb_misses() -> None:
    """Data that claims a terabyte is rejected before memory is allocated for it."""
    tier, inner, key, block = framed_with_one_block("zstd")
    # Magic; descriptor of a single segment with a content size of 8 bytes; that size; no block.
    bomb = struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 40) + b"\1\0\0"
    assert zstandard.frame_content_size(bomb) == 1 << 40
    check_rejected(
        tier, inner, key, compressed_frame(key, block, block[0::2] + bomb), "decompression"
    )


def test_framed_load_into_too_small_buffer_misses() -> None:
    for codec in ("none", "zstd"):
        tier, inner, key, _ = framed_with_one_block(codec)
        assert get(tier, key, BLOCK_NBYTES - 1) is None
        assert tier.stats().rejected == {"size": 1}
        assert key not in inner.values


def test_framed_load_of_block_larger_than_block_nbytes_misses() -> None:
    tier, inner, key, _ = framed_with_one_block("zstd")
    large = bytes(4 * BLOCK_NBYTES)
    stored = zstandard.ZstdCompressor().compress(large)
    inner.values[key] = compressed_frame(key, large, stored, element=1)
    assert get(tier, key, len(large)) is None
    assert tier.stats().rejected == {"size": 1}


def test_framed_load_of_batch_with_one_bad_frame_misses_one_block() -> None:
    inner = DictTier()
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES, codec="zstd")
    keys = keys_of("batch", 5)
    blocks = [kv_like_block(BLOCK_NBYTES, seed) for seed in range(5)]
    assert tier.store(keys[:4], views(blocks[:4])) == [True] * 4
    inner.values[keys[1]] = inner.values[keys[2]]
    into = [bytearray(BLOCK_NBYTES) for _ in keys]
    written = tier.load([*keys, keys[1]], [*views(into), memoryview(bytearray(BLOCK_NBYTES))])
    assert written == [BLOCK_NBYTES, 0, BLOCK_NBYTES, BLOCK_NBYTES, 0, 0]
    for at in (0, 2, 3):
        assert into[at] == blocks[at]
    assert into[1] == bytes(BLOCK_NBYTES)
    assert tier.contains(keys) == [True, False, True, True, False]
