"""The file ``records`` of a tier's directory: which block is in which slot of the file ``blocks``.

::

    page of geometry   magic (8), bytes of a slot (8), slots (8), whether ``blocks`` is marked (1)
    a record per slot  slot (4), generation (8), bytes of the block (8), bytes of the key (1), bytes
                       of the parent's key (1), the key (64), the parent's key (64), CRC-32 of all
                       that (4); if a key has more than 64 bytes: the rest of the key (16), of the
                       parent's key (16), CRC-32 of all that (4); zeros up to 256; zeros if the slot
                       has no block

Numbers are little-endian; numbers in brackets are bytes.

Invariants:

* A file for another slot size counts as empty; so does a record that does not verify. If only the
  number of slots changes, the blocks in the remaining slots are kept.
* A record that was cleared, or that is of a slot beyond the end of ``blocks``, never comes back.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from typing import NamedTuple

PAGE = 4096  # the unit of direct I/O
RECORD_NBYTES = 256
KEY_NBYTES = 80
"""Bytes of the longest key."""

FIELD_NBYTES = 64
"""Bytes of a key in the first part of a record; the rest of a longer key follows the first CRC."""

_MAGIC = b"kvcdisk2"
_MAGIC_OF_ALL_VERSIONS = _MAGIC[:-1]
_GEOMETRY = struct.Struct("<8sQQ")
_PAGE = struct.Struct("<8sQQ?")
_MARK = "user.kvcache"
_FIELDS = struct.Struct(f"<IQQBB{FIELD_NBYTES}s{FIELD_NBYTES}s")
_RESTS = struct.Struct(f"<{KEY_NBYTES - FIELD_NBYTES}s{KEY_NBYTES - FIELD_NBYTES}s")
_CRC = struct.Struct("<I")
_USED_NBYTES = _FIELDS.size + _CRC.size + _RESTS.size + _CRC.size
_RECORD = struct.Struct(f"<{_FIELDS.size}sI{_RESTS.size}sI{RECORD_NBYTES - _USED_NBYTES}x")

NEWEST_GENERATION = 2**63 - 1
"""The highest generation of a record that verifies. A tier that stores blocks cannot reach it, and
the next one must fit into the field."""

CHECKED_NBYTES = _FIELDS.size + _CRC.size
"""Bytes of the first part of a record, with its CRC."""


class Offsets(NamedTuple):
    """Where the fields of a record begin."""

    slot: int = 0
    generation: int = 4
    nbytes: int = 12
    key_size: int = 20
    parent_size: int = 21
    key: int = 22


OFFSETS = Offsets()


def file_nbytes(slots: int) -> int:
    """Bytes of a file with records for ``slots`` slots."""
    return PAGE + slots * RECORD_NBYTES


class Record(NamedTuple):
    """The block in a slot. Records sort by age, the oldest first."""

    generation: int  # higher is newer
    slot: int
    nbytes: int  # of the block
    key: bytes
    parent: bytes  # the key that the block continues; empty if that is not known


class Geometry(NamedTuple):
    """The size and the number of slots for which a tier's files were created."""

    slot_nbytes: int
    slots: int


def read_geometry(fd: int) -> Geometry | None:
    """Return the geometry that a file of records contains; ``None`` if it is no such file."""
    page = os.pread(fd, _GEOMETRY.size, 0)
    if len(page) < _GEOMETRY.size:
        return None
    magic, slot_nbytes, slots = _GEOMETRY.unpack(page)
    return Geometry(slot_nbytes, slots) if magic == _MAGIC else None


def find_foreign_file(records_fd: int | None, blocks_fd: int | None) -> str | None:
    """Return which of a tier's two files was not written by a tier; ``None`` if both were.

    The page of geometry identifies ``records``; a file without one is a tier's too. An extended
    attribute, if the file system keeps any, identifies ``blocks``. A copy of ``blocks`` has lost
    the attribute, and is identified by its size in the page of geometry.

    Args:
        records_fd: the file ``records``; ``None`` if it does not exist.
        blocks_fd: the file ``blocks``; ``None`` if it does not exist.
    """
    page = b"" if records_fd is None else os.pread(records_fd, _PAGE.size, 0)
    magic, slot_nbytes, slots, marked = _PAGE.unpack(page.ljust(_PAGE.size, b"\0"))
    is_records = magic[: len(_MAGIC_OF_ALL_VERSIONS)] == _MAGIC_OF_ALL_VERSIONS
    if page.strip(b"\0") and not is_records:
        return "records"
    nbytes = 0 if blocks_fd is None else os.fstat(blocks_fd).st_size
    if blocks_fd is None or not nbytes or _is_marked(blocks_fd):
        return None
    if is_records and (not marked or nbytes == slots * slot_nbytes):
        return None
    return "blocks"


def is_blank(fd: int) -> bool:
    """Whether a file of records has no page of geometry: it is new, or it was emptied."""
    return not os.pread(fd, _PAGE.size, 0).strip(b"\0")


def _is_marked(blocks_fd: int) -> bool:
    try:
        return bool(os.getxattr(blocks_fd, _MARK))
    except OSError:
        return False


def mark_blocks(blocks_fd: int) -> bool:
    """Mark ``blocks`` as a tier's; return False if its file system keeps no attributes."""
    try:
        os.setxattr(blocks_fd, _MARK, _MAGIC)
    except OSError:
        return False
    return True


def read_record(fd: int, geometry: Geometry, slot: int) -> Record | None:
    """Return the record of one slot; ``None`` if there is none that verifies."""
    data = os.pread(fd, RECORD_NBYTES, file_nbytes(slot))
    if len(data) < RECORD_NBYTES:
        return None
    return unpack_record(data, slot, geometry.slot_nbytes)


def unpack_record(data: bytes | bytearray, slot: int, slot_nbytes: int) -> Record | None:
    """Return the record that was read for ``slot``, if it verifies."""
    fields, crc, rests, rests_crc = _RECORD.unpack(data)
    if crc != zlib.crc32(fields):
        return None
    own_slot, generation, nbytes, key_size, parent_size, key, parent = _FIELDS.unpack(fields)
    if max(key_size, parent_size) > FIELD_NBYTES:
        if rests_crc != zlib.crc32(rests, crc):
            return None
        key_rest, parent_rest = _RESTS.unpack(rests)
        key, parent = key + key_rest, parent + parent_rest
    if max(key_size, parent_size) > KEY_NBYTES or generation > NEWEST_GENERATION:
        return None
    if own_slot == slot and nbytes <= slot_nbytes:
        return Record(generation, slot, nbytes, key[:key_size], parent[:parent_size])
    return None


class RecordFile:
    """The records of an open tier.

    Args:
        fd: the file ``records``, open to read and write.
        slot_nbytes: bytes of a slot.
        slots: how many slots the file ``blocks`` will have.
        blocks_fd: the file ``blocks``, still with the size that it had before.

    Attributes:
        kept: whether the file had records for slots of this size, which are kept.
        was_blank: whether the file was new, or was emptied.

    Raises:
        OSError: the file cannot be read, or the file system has no room for it.
    """

    def __init__(self, fd: int, slot_nbytes: int, slots: int, blocks_fd: int) -> None:
        self._fd = fd
        self._geometry = Geometry(slot_nbytes, slots)
        self.was_blank = is_blank(fd)
        previous = read_geometry(fd)
        blocks_nbytes = os.fstat(blocks_fd).st_size
        self.kept = previous is not None and previous.slot_nbytes == slot_nbytes
        kept_slots = 0
        if previous and self.kept:
            kept_slots = min(slots, previous.slots, blocks_nbytes // slot_nbytes)
        # Cutting and extending the file makes all records beyond the kept slots zeros.
        os.ftruncate(fd, file_nbytes(kept_slots))
        os.posix_fallocate(fd, 0, file_nbytes(slots))
        os.pwrite(fd, _PAGE.pack(_MAGIC, *self._geometry, mark_blocks(blocks_fd)), 0)
        if previous != self._geometry:
            os.fdatasync(fd)  # the page must be on the disk before blocks that it describes

    def write(self, *records: Record) -> None:
        """Write the records of adjacent slots, in their order."""
        self._write(records[0].slot, b"".join(map(_packed, records)))

    def clear(self, slot: int, count: int = 1) -> None:
        """Record that ``slot``, or ``count`` slots from it on, have no block."""
        self._write(slot, bytes(count * RECORD_NBYTES))

    def _write(self, slot: int, data: bytes) -> None:
        if os.pwrite(self._fd, data, file_nbytes(slot)) < len(data):
            raise OSError(errno.EIO, "only a part of a record was written")


def _packed(record: Record) -> bytes:
    """Return the bytes of a record, without the key of a parent that is too long for it."""
    parent = record.parent if len(record.parent) <= KEY_NBYTES else b""
    fields = _FIELDS.pack(
        record.slot,
        record.generation,
        record.nbytes,
        len(record.key),
        len(parent),
        record.key[:FIELD_NBYTES],
        parent[:FIELD_NBYTES],
    )
    crc, rests, rests_crc = zlib.crc32(fields), b"", 0
    if max(len(record.key), len(parent)) > FIELD_NBYTES:
        rests = _RESTS.pack(record.key[FIELD_NBYTES:], parent[FIELD_NBYTES:])
        rests_crc = zlib.crc32(rests, crc)
    return _RECORD.pack(fields, crc, rests, rests_crc)
