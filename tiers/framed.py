"""A tier around a tier: blocks leave in a frame that says what they are, and are checked on return.

::

    header, one page                                     payload
    | magic | version | codec | raw | stored | digest | 0... | stored bytes                     |

    "none"   the block as it is
    "zstd"   the low bytes of its elements as they are, then the high bytes compressed

Always true here:

* What does not verify is a miss, counted, and removed: a changed byte anywhere in the frame, a
  frame cut short or under another key, another version.
* The digest (XXH3, 128 bits) covers the header's fields, the key and the raw bytes. It finds damage
  and mix-ups; it does not keep out somebody who means to deceive.
* A frame of whole pages is whole pages in page-aligned memory, so that a disk can take it as it is.
* A block is copied once on its way out and once on its way in; scratch memory is bounded whatever
  the batch.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal

import xxhash

from kvcache.tier import Tier

HEADER_NBYTES = 4096
"""What a frame adds to a block: one page, 0.2 % of 2 MiB."""

VERSION = 1
RAW, ZSTD = 0, 1
LEAST_GAIN = 0.1  # of a block's bytes; below that a compressed block is stored as it is
SCRATCH = 8  # frames in memory at once, and in one call to the tier inside

_MAGIC = b"kvcframe"
_FIELDS = struct.Struct("<8sHBBQQ")  # magic, version, codec, element bytes, raw, stored
_DIGEST = slice(_FIELDS.size, _FIELDS.size + 16)
_REST = bytes(HEADER_NBYTES - _DIGEST.stop)


@dataclass(slots=True)
class FrameStats:
    """What passed through frames, in blocks and bytes."""

    stored_raw: int = 0
    stored_compressed: int = 0
    verified: int = 0
    rejected: int = 0  # did not verify, and was removed
    unreadable: int = 0  # compressed, and zstandard is not installed here
    raw_nbytes: int = 0  # of blocks that were stored
    framed_nbytes: int = 0  # of their frames


class BadFrameError(ValueError):
    """Bytes that are not the frame they should be."""


class Framed(Tier):
    """Frames around what ``inner`` keeps.

    Args:
        inner: the tier that keeps the frames, of up to ``block_nbytes + HEADER_NBYTES`` bytes.
        block_nbytes: bytes of a block.
        codec: what new frames are written with; any frame can be read.
        level: of zstd; 1 is fast, and more gains little on KV.
        element_nbytes: of the numbers in a block; 2 splits them in bytes before compression.

    Raises:
        ImportError: when ``codec`` is "zstd" and the package ``zstandard`` is not there.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        block_nbytes: int,
        codec: Literal["none", "zstd"] = "none",
        level: int = 1,
        element_nbytes: int = 2,
    ) -> None:
        if codec == "zstd":
            _zstandard()
        self._inner = inner
        self._block_nbytes = block_nbytes
        self._codec = codec
        self._element_nbytes = element_nbytes
        self._coders = _Coders(level)
        self._scratch: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(SCRATCH):
            self._scratch.put(memoryview(mmap.mmap(-1, HEADER_NBYTES + block_nbytes)))
        self._lock = threading.Lock()
        self.stats = FrameStats()

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self._inner.contains(keys)

    def store(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        stored: list[bool] = []
        while len(stored) < len(keys):
            first = len(stored)
            with self._buffers(len(keys) - first) as buffers:
                some = slice(first, first + len(buffers))
                frames = [
                    buffer[: self._frame(key, block, buffer)]
                    for key, block, buffer in zip(keys[some], blocks[some], buffers, strict=True)
                ]
                stored += self._inner.store(keys[some], frames)
        return stored

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written: list[int] = []
        while len(written) < len(keys):
            first = len(written)
            with self._buffers(len(keys) - first) as buffers:
                some = slice(first, first + len(buffers))
                got = self._inner.load(keys[some], buffers)
                for key, buffer, nbytes, target in zip(
                    keys[some], buffers, got, into[some], strict=True
                ):
                    written.append(self._unframe(key, buffer[:nbytes], target) if nbytes else 0)
        return written

    def remove(self, keys: Sequence[bytes]) -> None:
        self._inner.remove(keys)

    def close(self) -> None:
        self._inner.close()

    @contextmanager
    def _buffers(self, most: int) -> Iterator[list[memoryview]]:
        """Some of the scratch: one at least, when it is free."""
        buffers = [self._scratch.get()]
        try:
            while len(buffers) < most:
                try:
                    buffers.append(self._scratch.get_nowait())
                except Empty:
                    break
            yield buffers
        finally:
            for buffer in buffers:
                self._scratch.put(buffer)

    def _frame(self, key: bytes, block: memoryview, buffer: memoryview) -> int:
        """Put ``block``'s frame into ``buffer``; give its bytes."""
        raw = len(block)
        if raw > self._block_nbytes:
            raise ValueError(f"a block of {raw} bytes; these frames hold {self._block_nbytes}")
        payload = buffer[HEADER_NBYTES : HEADER_NBYTES + raw]
        codec, stored = RAW, raw
        if self._codec == "zstd":
            stored = self._coders.pack(block, payload, self._element_nbytes)
            codec = ZSTD if stored else RAW
        if codec == RAW:
            payload[:] = block
            stored = raw
        fields = _FIELDS.pack(_MAGIC, VERSION, codec, self._element_nbytes, raw, stored)
        buffer[: _FIELDS.size] = fields
        buffer[_DIGEST] = _digest(fields, key, block)
        buffer[_DIGEST.stop : HEADER_NBYTES] = _REST
        with self._lock:
            self.stats.raw_nbytes += raw
            self.stats.framed_nbytes += HEADER_NBYTES + stored
            if codec == RAW:
                self.stats.stored_raw += 1
            else:
                self.stats.stored_compressed += 1
        return HEADER_NBYTES + stored

    def _unframe(self, key: bytes, frame: memoryview, target: memoryview) -> int:
        """Check a frame and put its block into ``target``; give the block's bytes, or 0."""
        try:
            raw = self._checked(key, frame, target)
        except BadFrameError:
            with self._lock:
                self.stats.rejected += 1
            self._inner.remove([key])
            return 0
        except ImportError:
            with self._lock:
                self.stats.unreadable += 1
            return 0  # others can read it
        with self._lock:
            self.stats.verified += 1
        return raw

    def _checked(self, key: bytes, frame: memoryview, target: memoryview) -> int:
        if len(frame) < HEADER_NBYTES:
            raise BadFrameError("cut short")
        fields = bytes(frame[: _FIELDS.size])
        magic, version, codec, element_nbytes, raw, stored = _FIELDS.unpack(fields)
        payload = frame[HEADER_NBYTES:]
        if (magic, version) != (_MAGIC, VERSION) or codec not in (RAW, ZSTD):
            raise BadFrameError("of another kind")
        if len(payload) != stored or raw > len(target):
            raise BadFrameError("of another length")
        if frame[_DIGEST.stop : HEADER_NBYTES] != _REST:
            raise BadFrameError("changed")
        block: memoryview = payload
        if codec == ZSTD:
            block = memoryview(self._coders.unpack(payload, raw, element_nbytes))
        if len(block) != raw or frame[_DIGEST] != _digest(fields, key, block):
            raise BadFrameError("changed, or another key's")
        target[:raw] = block
        return int(raw)


def _digest(fields: bytes, key: bytes, block: memoryview) -> bytes:
    digest = xxhash.xxh3_128(fields)
    digest.update(len(key).to_bytes(2, "little") + key)
    digest.update(block)
    return digest.digest()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"codec zstd: pip install 'kvcache[zstd]' ({error})") from error
    return zstandard


@dataclass(slots=True)
class _Coders:
    """zstd, a pair of contexts for each thread: they may not be shared."""

    level: int
    _mine: threading.local = field(default_factory=threading.local)

    def pack(self, block: memoryview, into: memoryview, element_nbytes: int) -> int:
        """Compress ``block`` into ``into``; give the bytes taken, 0 when it is not worth it."""
        low, high = _planes(bytes(block), element_nbytes)
        packed = self._contexts()[0].compress(high)
        stored = len(low) + len(packed)
        if stored > (1 - LEAST_GAIN) * len(block):
            return 0
        into[: len(low)] = low
        into[len(low) : stored] = packed
        return stored

    def unpack(self, payload: memoryview, raw: int, element_nbytes: int) -> bytearray:
        """The block of ``raw`` bytes that was packed; BadFrameError when there is none."""
        if element_nbytes not in (1, 2):
            raise BadFrameError("of elements that are not known")
        split = raw // 2 if element_nbytes == 2 else 0
        high_nbytes = raw - split
        try:
            high = self._contexts()[1].decompress(payload[split:], max_output_size=high_nbytes)
        except _zstandard().ZstdError as error:
            raise BadFrameError("not zstd") from error
        if len(high) != high_nbytes:
            raise BadFrameError("of another length")
        if not split:
            return bytearray(high)
        block = bytearray(raw)
        block[0 : 2 * split : 2] = payload[:split]
        block[1 : 2 * split : 2] = high[:split]
        block[2 * split :] = high[split:]
        return block

    def _contexts(self) -> tuple[Any, Any]:
        if not hasattr(self._mine, "contexts"):
            zstandard = _zstandard()
            self._mine.contexts = (
                zstandard.ZstdCompressor(level=self.level, write_checksum=False),
                zstandard.ZstdDecompressor(),
            )
        contexts: tuple[Any, Any] = self._mine.contexts
        return contexts


def _planes(block: bytes, element_nbytes: int) -> tuple[bytes, bytes]:
    """The bytes that do not compress, and those that may: of 2-byte floats, exponent and sign."""
    if element_nbytes != 2:
        return b"", block
    even = len(block) & ~1
    return block[0:even:2], block[1:even:2] + block[even:]
