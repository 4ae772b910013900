"""The format of a frame, version 1, and the code that packs and unpacks one.

::

    offset   bytes   field (numbers are little-endian)
         0       4   magic, "KVCF"
         4       2   version, 1
         6       1   codec: 0 raw, 1 zstd
         7       1   bytes of an element; 0 if raw
         8       8   bytes of the block
        16       8   bytes of the payload; those of the block if raw
        24      16   checksum: XXH3 of 128 bits over bytes 0 to 23, the raw block and the key
        40    4056   zeros
      4096           payload, then zeros up to a multiple of 4 KiB

The header takes a whole page, so that the payload starts on a page and every frame is whole pages,
as direct I/O requires. In a tier that keeps whole pages, a shorter header would save nothing; for a
block of 2 MiB the page is 0.2 %.

With codec zstd, byte planes are separated: the payload has the first byte of every element, then
the second, and so on; the last plane (the highest byte) is one zstd frame, the others are raw.

Invariants:

* A frame describes itself: the reader needs no options.
* A frame is verified before any of its bytes reaches a caller's buffer.
* The size that zstd data claims is checked before memory is allocated for it.

The checksum is XXH3 because on 2 MiB it is 14 times as fast as ``zlib.crc32``, the fastest 32-bit
checksum of the standard library, and faster than the copy that it guards; hence the dependency on
``xxhash``. It detects damage and mistakes, not forgery.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from xxhash import xxh3_128

from .memory import map_memory

PAGE: Final = 4096  # part of the format, also on hosts with larger pages
HEADER_NBYTES: Final = PAGE
MAGIC: Final = b"KVCF"
VERSION: Final = 1
RAW: Final = 0  # the payload is the block
ZSTD: Final = 1  # the low byte planes of the elements, then the highest one compressed

_FIELDS = struct.Struct("<4sHBBQQ")
_CHECKSUM_END = _FIELDS.size + 16
_ZEROS = bytes(PAGE)


def frame_nbytes(payload_nbytes: int) -> int:
    """Bytes of a frame with this payload. With a whole block as payload: the largest frame."""
    return HEADER_NBYTES + -(-payload_nbytes // PAGE) * PAGE


class RejectedError(Exception):
    """A frame does not verify. The message is a reason of :attr:`FrameStats.rejected`."""


class Workspace:
    """Memory for some frames, and zstd's contexts; for one call at a time.

    Args:
        frames: how many frames it holds.
        block_nbytes: bytes of the largest block.
        level: zstd's level; ``None`` does not compress.
        element_nbytes: bytes of an element of the blocks to compress.
        memory: memory of the inner tier, as much as ``frames`` frames take; ``None`` maps some.

    Attributes:
        nbytes: bytes of memory of all frames.
        frames: the memory of each frame; it starts on a page, and holds the largest frame.
        compressed: of each frame, whether the payload that ``pack`` wrote is compressed.
    """

    def __init__(
        self,
        frames: int,
        block_nbytes: int,
        level: int | None,
        element_nbytes: int,
        memory: memoryview | None = None,
    ) -> None:
        self._block_nbytes = block_nbytes
        self._element_nbytes = element_nbytes
        self._frame_nbytes = frame_nbytes(block_nbytes)
        self.nbytes = frames * self._frame_nbytes
        self._in_own_memory = memory is None
        # Byte planes are slices of a map, because strided slices of a memoryview are ten times
        # slower. In memory of the tier they go through a map of one block.
        self._map: mmap.mmap | None = None
        if memory is None:
            self._map = map_memory(self.nbytes)
            memory = memoryview(self._map)
        self.frames = [
            memory[start : start + self._frame_nbytes]
            for start in range(0, self.nbytes, self._frame_nbytes)
        ]
        self.compressed = [False] * frames
        self._zstandard: Any = zstandard()
        self._decompressor: Any = self._zstandard and self._zstandard.ZstdDecompressor()
        self._compress: Callable[[bytes], bytes] | None = None
        if self._zstandard and level:
            self._compress = self._zstandard.ZstdCompressor(level=level).compress

    def pack(self, slot: int, key: bytes, block: memoryview) -> memoryview:
        """Write the frame of ``block`` into ``frames[slot]``; return the part that it takes."""
        frame, size = self.frames[slot], len(block)
        raw = frame[HEADER_NBYTES : HEADER_NBYTES + size]
        # The only use of the caller's memory, by assignment alone: it may be revoked at any time
        # (``kvcache.lower.lent_calls``), and a slice or an array over it would outlive that.
        raw[:] = block
        planes = []
        if self._compress:
            source, slices = self._planes(slot, size, self._element_nbytes)
            if not self._in_own_memory:
                source[:size] = raw
            *low, high = (source[plane] for plane in slices)
            planes = [*low, self._compress(high)]
        payload_nbytes = sum(map(len, planes))
        if planes and 10 * frame_nbytes(payload_nbytes) <= 9 * frame_nbytes(size):
            fields = _FIELDS.pack(MAGIC, VERSION, ZSTD, self._element_nbytes, size, payload_nbytes)
        else:
            planes, payload_nbytes = [], size
            fields = _FIELDS.pack(MAGIC, VERSION, RAW, 0, size, size)
        self.compressed[slot] = bool(planes)
        frame[:HEADER_NBYTES] = (fields + checksum(fields, raw, key)).ljust(HEADER_NBYTES, b"\0")
        start = HEADER_NBYTES
        for plane in planes:
            frame[start : start + len(plane)] = plane
            start += len(plane)
        payload_end, frame_end = HEADER_NBYTES + payload_nbytes, frame_nbytes(payload_nbytes)
        frame[payload_end:frame_end] = _ZEROS[: frame_end - payload_end]
        return frame[:frame_end]

    def unpack(self, slot: int, length: int, key: bytes, into: memoryview) -> int:
        """Verify ``frames[slot]``, copy its block to ``into``, and return the block's bytes.

        Args:
            slot: which frame.
            length: the bytes that the inner tier wrote into it.
            key: the block's key.
            into: the caller's buffer.

        Raises:
            RejectedError: the frame does not verify; ``into`` is unchanged.
        """
        frame = self.frames[slot]
        fields: tuple[bytes, int, int, int, int, int] = _FIELDS.unpack_from(frame)
        magic, version, codec, element, size, payload_nbytes = fields
        if magic != MAGIC:
            raise RejectedError("magic")
        if version != VERSION:
            raise RejectedError("version")
        fields_valid = (
            payload_nbytes == size and element == 0
            if codec == RAW
            else codec == ZSTD and element > 0 and payload_nbytes < size
        )
        if not fields_valid or bytes(frame[_CHECKSUM_END:HEADER_NBYTES]) != _ZEROS[_CHECKSUM_END:]:
            raise RejectedError("header")
        if not 0 < size <= min(len(into), self._block_nbytes):
            raise RejectedError("size")
        end = HEADER_NBYTES + payload_nbytes
        if length != frame_nbytes(payload_nbytes):
            raise RejectedError("length")
        if bytes(frame[end:length]) != _ZEROS[: length - end]:
            raise RejectedError("padding")
        expected = bytes(frame[_FIELDS.size : _CHECKSUM_END])
        if codec == ZSTD:
            self._decompress(slot, size, payload_nbytes, element)
        raw = frame[HEADER_NBYTES : HEADER_NBYTES + size]
        if expected != checksum(frame[: _FIELDS.size], raw, key):
            raise RejectedError("checksum")
        # The only use of the caller's memory, as in ``pack``.
        into[:size] = raw
        return size

    def _decompress(self, slot: int, size: int, payload_nbytes: int, element: int) -> None:
        """Replace the payload of ``frames[slot]`` with the raw block."""
        if self._zstandard is None:
            raise RejectedError("codec")
        frame = self.frames[slot]
        at, end = HEADER_NBYTES, HEADER_NBYTES + payload_nbytes
        *low, high_nbytes = (len(range(first, size, element)) for first in range(element))
        planes = []
        for nbytes in low:
            planes.append(bytes(frame[at : at + nbytes]))
            at += nbytes
        compressed = bytes(frame[at : max(at, end)])
        try:
            # zstd allocates as much memory as the data claims to need.
            if self._zstandard.frame_content_size(compressed) != high_nbytes:
                raise RejectedError("decompression")
            planes.append(self._decompressor.decompress(compressed, allow_extra_data=False))
        except self._zstandard.ZstdError:
            raise RejectedError("decompression") from None
        target, slices = self._planes(slot, size, element)
        for plane, data in zip(slices, planes, strict=True):
            target[plane] = data
        if not self._in_own_memory:
            frame[HEADER_NBYTES : HEADER_NBYTES + size] = memoryview(target)[:size]

    def _planes(self, slot: int, size: int, element: int) -> tuple[mmap.mmap, list[slice]]:
        """Return a map for a raw block, and slices: the first byte of every element, and so on.

        It is the memory of the frame if that is a map, else one that the frame's block is copied
        from or to.
        """
        at = slot * self._frame_nbytes + HEADER_NBYTES if self._in_own_memory else 0
        if self._map is None:
            self._map = map_memory(self._block_nbytes)
        return self._map, [slice(at + first, at + size, element) for first in range(element)]


class BorrowedWorkspace(Workspace):
    """A workspace in memory of the inner tier, until it is closed.

    Args:
        memory: as much as ``frames`` frames take.
    """

    def __init__(
        self,
        frames: int,
        block_nbytes: int,
        level: int | None,
        element_nbytes: int,
        memory: memoryview,
    ) -> None:
        super().__init__(frames, block_nbytes, level, element_nbytes, memory)
        self._in_use = threading.Lock()  # while a frame is packed or unpacked
        self._closed = False

    def pack(self, slot: int, key: bytes, block: memoryview) -> memoryview:
        """As ``Workspace.pack``. Raises ValueError if the workspace is closed."""
        with self._in_use:
            self._check_open()
            return super().pack(slot, key, block)

    def unpack(self, slot: int, length: int, key: bytes, into: memoryview) -> int:
        """As ``Workspace.unpack``. Raises ValueError if the workspace is closed."""
        with self._in_use:
            self._check_open()
            return super().unpack(slot, length, key, into)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the tier is closed, and its memory with it")

    def close(self) -> None:
        """Wait until no frame is packed or unpacked, and refuse both from now on."""
        with self._in_use:
            self._closed = True


def checksum(fields: bytes | memoryview, raw: memoryview, key: bytes) -> bytes:
    """The checksum of a frame.

    ``fields`` contain the length of ``raw``, so no byte can move from the block to the key.
    """
    digest = xxh3_128(fields)
    digest.update(raw)
    digest.update(key)
    return digest.digest()


def zstandard() -> ModuleType | None:
    """The package ``zstandard``; ``None`` if it is not installed."""
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard
