"""The file of records: which block is in which slot of the file of blocks.

A page of geometry (magic, bytes of a slot, slots), then 256 bytes per slot, zeros where there is no
block. Little-endian, in a record: slot (4), generation (8), bytes of the block (8), bytes of the
key (1), bytes of the key before it (1), the keys (64 each), a CRC-32 of all that (4), zeros.

Always true here:

* Files of another geometry count as empty, as do records that do not verify.
* A record that was cleared, or stood for a slot that the file of blocks does not reach, never
  comes back.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from kvcache.tiers.disk.files import PAGE

RECORD_NBYTES = 256
KEY_NBYTES = 64  # at most

_MAGIC = b"kvcdisk2"
_GEOMETRY = struct.Struct("<8sQQ")
_FIELDS = struct.Struct(f"<IQQBB{KEY_NBYTES}s{KEY_NBYTES}s")
_CRC = struct.Struct("<I")
_WHOLE = struct.Struct(f"<{_FIELDS.size}sI{RECORD_NBYTES - _FIELDS.size - _CRC.size}x")
_READ_NBYTES = 1 << 20  # at a time


def file_nbytes(slots: int) -> int:
    """Bytes of a file with records for so many slots."""
    return PAGE + slots * RECORD_NBYTES


class Record(NamedTuple):
    """Whose block is in a slot. Records sort by age, the oldest first."""

    generation: int  # higher is newer
    slot: int
    nbytes: int  # of the block
    key: bytes
    after: bytes  # the key that the block continues; empty if that is not known


class Records:
    """The records of ``slots`` slots.

    Args:
        file: its number, open to read and write.
        slot_nbytes: bytes of a slot.
        slots: how many the file of blocks will have.
        blocks_nbytes: how large the file of blocks is now. What lies beyond was not written.

    Raises:
        OSError: when there is no room for it, or it cannot be read.
    """

    def __init__(self, file: int, slot_nbytes: int, slots: int, blocks_nbytes: int) -> None:
        self._file = file
        self._slot_nbytes = slot_nbytes
        self._slots = slots
        geometry = _GEOMETRY.pack(_MAGIC, slot_nbytes, slots)
        known = os.pread(file, len(geometry), 0) == geometry
        whole = min(slots, blocks_nbytes // slot_nbytes) if known else 0
        # Cut and grown again: what was behind reads as zeros, now and after the next start.
        os.ftruncate(file, file_nbytes(whole))
        os.posix_fallocate(file, 0, file_nbytes(slots))
        os.pwrite(file, geometry, 0)

    def __iter__(self) -> Iterator[Record]:
        """Every record that verifies, by slot."""
        end, at = file_nbytes(self._slots), 0
        for begin in range(PAGE, end, _READ_NBYTES):
            piece = os.pread(self._file, min(_READ_NBYTES, end - begin), begin)
            for fields, crc in _WHOLE.iter_unpack(piece):
                if crc == zlib.crc32(fields):
                    slot, generation, nbytes, size, size_after, key, after = _FIELDS.unpack(fields)
                    whole = max(size, size_after) <= KEY_NBYTES and nbytes <= self._slot_nbytes
                    if slot == at and whole:
                        yield Record(generation, slot, nbytes, key[:size], after[:size_after])
                at += 1

    def write(self, record: Record) -> None:
        """Name the block that is in a slot."""
        sizes = len(record.key), len(record.after)
        fields = _FIELDS.pack(
            record.slot, record.generation, record.nbytes, *sizes, record.key, record.after
        )
        self._put(record.slot, _WHOLE.pack(fields, zlib.crc32(fields)))

    def clear(self, slot: int) -> None:
        """Say that there is none in it."""
        self._put(slot, bytes(RECORD_NBYTES))

    def _put(self, slot: int, record: bytes) -> None:
        if os.pwrite(self._file, record, file_nbytes(slot)) < len(record):
            raise OSError(errno.EIO, "a record was written in part")
