"""The file of records: which block is in which slot of the file of blocks.

A page of geometry (magic, bytes of a slot, slots, whether the file of blocks is marked), then 256
bytes per slot, zeros where there is no block. Little-endian, in a record: slot (4), generation (8),
bytes of the block (8), bytes of the key (1), bytes of the key before it (1), the keys (64 each), a
CRC-32 of all that (4), zeros.

Always true here:

* Files of another slot size count as empty, as do records that do not verify. With another number
  of slots, blocks in the slots that stay are kept.
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

PAGE = 4096  # what direct I/O goes by
RECORD_NBYTES = 256
KEY_NBYTES = 64  # at most

_MAGIC = b"kvcdisk2"
_GEOMETRY = struct.Struct("<8sQQ")
_PAGE = struct.Struct("<8sQQ?")
_MARK = "user.kvcache"
_FIELDS = struct.Struct(f"<IQQBB{KEY_NBYTES}s{KEY_NBYTES}s")
_CRC = struct.Struct("<I")
_WHOLE = struct.Struct(f"<{_FIELDS.size}sI{RECORD_NBYTES - _FIELDS.size - _CRC.size}x")
_READ_NBYTES = 1 << 20  # at a time
_BEYOND = 1 << 64  # every offset


def file_nbytes(slots: int) -> int:
    """Bytes of a file with records for so many slots."""
    return PAGE + slots * RECORD_NBYTES


class Record(NamedTuple):
    """Whose block is in a slot. Records sort by age, the oldest first."""

    generation: int  # higher is newer
    slot: int
    nbytes: int  # of the block
    key: bytes
    parent: bytes  # the key that the block continues; empty if that is not known


class Geometry(NamedTuple):
    """What the two files were made for."""

    slot_nbytes: int
    slots: int


def read_geometry(file: int) -> Geometry | None:
    """What a file of records says of itself; ``None`` if it is no such file."""
    page = os.pread(file, _GEOMETRY.size, 0)
    if len(page) < _GEOMETRY.size:
        return None
    magic, slot_nbytes, slots = _GEOMETRY.unpack(page)
    return Geometry(slot_nbytes, slots) if magic == _MAGIC else None


def foreign_file(records: int, blocks: int | None) -> str | None:
    """Which of the two files of a tier no version of the tier has written; ``None`` if both are.

    ``blocks`` is None where there is no such file.

    The records speak for the file of blocks beside them. Where the file system keeps attributes it
    has a mark as well; a copy without it is told by its size.
    """
    page = os.pread(records, _PAGE.size, 0)
    magic, slot_nbytes, slots, marked = _PAGE.unpack(page.ljust(_PAGE.size, b"\0"))
    ours = magic[:-1] == _MAGIC[:-1]  # of any version
    if page.strip(b"\0") and not ours:  # zeros: its process was killed when it had made the file
        return "records"
    nbytes = 0 if blocks is None else os.fstat(blocks).st_size
    if (
        blocks is None
        or not nbytes
        or (ours and (not marked or nbytes == slots * slot_nbytes or _is_marked(blocks)))
    ):
        return None
    return "blocks"


def _is_marked(blocks: int) -> bool:
    try:
        return bool(os.getxattr(blocks, _MARK))
    except OSError:
        return False


def mark(blocks: int) -> bool:
    """Mark the file of blocks as ours; False where its file system keeps no attributes."""
    try:
        os.setxattr(blocks, _MARK, _MAGIC)
    except OSError:
        return False
    return True


def read_records(file: int, geometry: Geometry) -> Iterator[Record]:
    """Every record that verifies, by slot. A file takes as long as it has data, not holes."""
    begin, end = PAGE, file_nbytes(geometry.slots)
    while (begin := _next_data(file, begin)) < end:
        piece = os.pread(file, min(_READ_NBYTES, end - begin), begin)
        if len(piece) < RECORD_NBYTES:
            return  # cut, by who opened the tier with another geometry
        at = (begin - PAGE) // RECORD_NBYTES
        for fields, crc in _WHOLE.iter_unpack(piece[: len(piece) // RECORD_NBYTES * RECORD_NBYTES]):
            if record := _verified(fields, crc, at, geometry.slot_nbytes):
                yield record
            at += 1
        begin += _READ_NBYTES


def _next_data(file: int, begin: int) -> int:
    """Where the next page with data begins, at ``begin`` or behind it; beyond all if there is none.

    A file system without holes answers with ``begin``.
    """
    try:
        return os.lseek(file, begin, os.SEEK_DATA) // PAGE * PAGE
    except OSError as error:
        if error.errno == errno.ENXIO:
            return _BEYOND
        return begin


def read_record(file: int, geometry: Geometry, slot: int) -> Record | None:
    """The record of one slot; ``None`` if there is none that verifies."""
    piece = os.pread(file, RECORD_NBYTES, file_nbytes(slot))
    if len(piece) < RECORD_NBYTES:
        return None
    fields, crc = _WHOLE.unpack(piece)
    return _verified(fields, crc, slot, geometry.slot_nbytes)


def _verified(fields: bytes, crc: int, at: int, slot_nbytes: int) -> Record | None:
    """The record that these bytes are, in slot ``at``."""
    if crc == zlib.crc32(fields):
        slot, generation, nbytes, size, size_after, key, parent = _FIELDS.unpack(fields)
        if slot == at and max(size, size_after) <= KEY_NBYTES and nbytes <= slot_nbytes:
            return Record(generation, slot, nbytes, key[:size], parent[:size_after])
    return None


class Records:
    """The records of ``slots`` slots.

    Args:
        file: its number, open to read and write.
        slot_nbytes: bytes of a slot.
        slots: how many the file of blocks will have.
        blocks: the number of the file of blocks, as large as it was before.

    Attributes:
        kept: whether the records that were there are of slots of this size, and count.

    Raises:
        OSError: when there is no room for it, or it cannot be read.
    """

    def __init__(self, file: int, slot_nbytes: int, slots: int, blocks: int) -> None:
        self._file = file
        self._geometry = Geometry(slot_nbytes, slots)
        was = read_geometry(file)
        written = os.fstat(blocks).st_size
        self.kept = was is not None and was.slot_nbytes == slot_nbytes
        whole = min(slots, was.slots, written // slot_nbytes) if was and self.kept else 0
        # Cut and grown again: what was behind reads as zeros, now and after the next start.
        os.ftruncate(file, file_nbytes(whole))
        os.posix_fallocate(file, 0, file_nbytes(slots))
        os.pwrite(file, _PAGE.pack(_MAGIC, *self._geometry, mark(blocks)), 0)
        if was != self._geometry:
            os.fdatasync(file)  # before blocks are there that this page speaks for

    def __iter__(self) -> Iterator[Record]:
        """Every record that verifies, by slot."""
        return read_records(self._file, self._geometry)

    def write(self, record: Record) -> None:
        """Name the block that is in a slot."""
        sizes = len(record.key), len(record.parent)
        fields = _FIELDS.pack(
            record.slot, record.generation, record.nbytes, *sizes, record.key, record.parent
        )
        self._put(record.slot, _WHOLE.pack(fields, zlib.crc32(fields)))

    def clear(self, slot: int) -> None:
        """Say that there is none in it."""
        self._put(slot, bytes(RECORD_NBYTES))

    def _put(self, slot: int, record: bytes) -> None:
        if os.pwrite(self._file, record, file_nbytes(slot)) < len(record):
            raise OSError(errno.EIO, "a record was written in part")
