"""Reads all records of a file, at a cost per record that lets an engine start soon.

C code of the standard library does the work of each record: ``struct`` splits a piece of the file,
``zlib`` verifies it, and slices of bytes collect its numbers. Only a record of an unusual form is
handled by itself.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, compress, count
from operator import ne, not_
from zlib import crc32

from kvcache.tiers.disk.record_file import (
    CHECKED_NBYTES,
    FIELD_NBYTES,
    NEWEST_GENERATION,
    OFFSETS,
    PAGE,
    RECORD_NBYTES,
    Geometry,
    Record,
    file_nbytes,
    unpack_record,
)

_READ_NBYTES = 1 << 18  # fits into the cache of a core
_BEYOND_ALL_OFFSETS = 1 << 64
_WHOLE = struct.Struct(f"{RECORD_NBYTES}s")
_CHECKED = struct.Struct(f"{CHECKED_NBYTES}s{RECORD_NBYTES - CHECKED_NBYTES}x")
_KEYS = struct.Struct(
    f"{OFFSETS.key}x{FIELD_NBYTES}s{FIELD_NBYTES}s{RECORD_NBYTES - OFFSETS.key - 2 * FIELD_NBYTES}x"
)
# The CRC-32 of any bytes that are followed by their own CRC-32, as little-endian number.
_CRC_OF_VERIFIED = 0x2144DF1C
_VERIFIED = bytes(CHECKED_NBYTES - 4) + struct.pack("<I", crc32(bytes(CHECKED_NBYTES - 4)))
_VERIFIED += bytes(RECORD_NBYTES - CHECKED_NBYTES)  # a record that verifies
_USUAL_SIZES = frozenset({(FIELD_NBYTES, FIELD_NBYTES), (FIELD_NBYTES, 0)})
"""Sizes of a key and of its parent's: a namespace and a digest each, or no parent."""


class RecordColumns:
    """Records that verified: entry ``i`` of each list is of the same record.

    Attributes:
        slots, generations, nbytes, keys: as in ``Record``.
        parents: as in ``Record``, but ``None`` if the parent is not known.
    """

    __slots__ = ("generations", "keys", "nbytes", "parents", "slots")

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.generations = array("Q")
        self.nbytes = array("Q")
        self.keys: list[bytes] = []
        self.parents: list[bytes | None] = []

    def __len__(self) -> int:
        return len(self.slots)

    def extend(self, other: RecordColumns) -> None:
        """Append the records of ``other``."""
        self.slots += other.slots
        self.generations += other.generations
        self.nbytes += other.nbytes
        self.keys += other.keys
        self.parents += other.parents

    def select(self, positions: Sequence[int]) -> None:
        """Keep the records at ``positions``, in this order."""
        self.slots = [self.slots[at] for at in positions]
        self.generations = array("Q", [self.generations[at] for at in positions])
        self.nbytes = array("Q", [self.nbytes[at] for at in positions])
        self.keys = [self.keys[at] for at in positions]
        self.parents = [self.parents[at] for at in positions]

    def by_age(self) -> list[int]:
        """Return the positions of the records, the oldest first."""
        return sorted(range(len(self)), key=self.generations.__getitem__)

    def nbytes_by_slot(self, slots: int) -> array[int]:
        """Return the bytes of the block in each of ``slots`` slots; 0 where there is none."""
        if len(self) == slots:
            return self.nbytes[:]
        found = array("Q", bytes(8 * slots))
        for slot, nbytes in zip(self.slots, self.nbytes, strict=True):
            found[slot] = nbytes
        return found

    def record(self, at: int) -> Record:
        """Return the record at a position."""
        slot, parent = self.slots[at], self.parents[at] or b""
        return Record(self.generations[at], slot, self.nbytes[at], self.keys[at], parent)

    def __iter__(self) -> Iterator[Record]:
        parents = (parent or b"" for parent in self.parents)
        columns = self.generations, self.slots, self.nbytes, self.keys, parents
        return map(Record._make, zip(*columns, strict=True))


def read_columns(fd: int, geometry: Geometry) -> RecordColumns:
    """Return every record that verifies, by slot."""
    records = RecordColumns()
    for piece in scan_records(fd, geometry):
        records.extend(piece)
    return records


def scan_records(fd: int, geometry: Geometry) -> Iterator[RecordColumns]:
    """Yield every record that verifies, by slot. The time depends on the data, not on holes."""
    buffer = bytearray(_READ_NBYTES)
    offset, end = PAGE, file_nbytes(geometry.slots)
    while (offset := _next_data(fd, offset)) < end:
        nbytes = os.preadv(fd, [memoryview(buffer)[: end - offset]], offset)
        if nbytes < RECORD_NBYTES:
            return  # another process opened the tier with fewer slots, and cut the file
        whole = buffer[: nbytes // RECORD_NBYTES * RECORD_NBYTES]
        yield _verified(whole, (offset - PAGE) // RECORD_NBYTES, geometry.slot_nbytes)
        offset += _READ_NBYTES


def _next_data(fd: int, offset: int) -> int:
    """Return where the next page with data begins, at ``offset`` or later.

    If there is none, this is a number larger than all offsets. A file system without holes returns
    ``offset``.
    """
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) // PAGE * PAGE
    except OSError as error:
        if error.errno == errno.ENXIO:
            return _BEYOND_ALL_OFFSETS
        return offset


def _verified(data: bytearray, first_slot: int, slot_nbytes: int) -> RecordColumns:
    """Return the records in ``data`` that verify.

    Args:
        data: whole records.
        first_slot: the slot of the first one.
        slot_nbytes: bytes of a slot.
    """
    records = RecordColumns()
    records.slots = list(range(first_slot, first_slot + len(data) // RECORD_NBYTES))
    if crc32(data) != _crc_of_verified(len(records)):
        crcs = map(crc32, chain.from_iterable(_CHECKED.iter_unpack(data)))
        verifies = [crc == _CRC_OF_VERIFIED for crc in crcs]
        records.slots = list(compress(records.slots, verifies))
        data = bytearray().join(compress(chain.from_iterable(_WHOLE.iter_unpack(data)), verifies))
    records.generations = _numbers(data, OFFSETS.generation, 8)
    records.nbytes = _numbers(data, OFFSETS.nbytes, 8)
    keys: list[bytes] = list(chain.from_iterable(_KEYS.iter_unpack(data)))
    records.keys, records.parents = keys[::2], [*keys[1::2]]
    for at in compress(count(), map(not_, data[OFFSETS.parent_size :: RECORD_NBYTES])):
        records.parents[at] = None
    wrong = _resolve_unusual(records, data, slot_nbytes)
    if wrong:
        records.select([at for at in range(len(records)) if at not in wrong])
    return records


@cache
def _crc_of_verified(count: int) -> int:
    """Return the CRC-32 of any ``count`` records that verify and end with zeros.

    It does not depend on their contents. A CRC-32 is linear: the difference between the CRCs of two
    pieces depends only on the difference between the pieces, and ends at zero behind a field that
    is followed by its own CRC in both. One damaged record always changes the CRC of the piece.
    """
    return crc32(_VERIFIED * count)


def _resolve_unusual(records: RecordColumns, data: bytearray, slot_nbytes: int) -> set[int]:
    """Check slots and byte counts, and read the keys of an unusual size from ``data``.

    Returns:
        the positions of the records that do not verify, although their CRC-32 does.
    """
    wrong: set[int] = set()
    own_slots = _numbers(data, OFFSETS.slot, 4)
    if own_slots != array("Q", records.slots):
        wrong.update(compress(count(), map(ne, own_slots, records.slots)))
    if max(records.nbytes, default=0) > slot_nbytes:
        wrong.update(at for at, nbytes in enumerate(records.nbytes) if nbytes > slot_nbytes)
    if max(records.generations, default=0) > NEWEST_GENERATION:
        generations = enumerate(records.generations)
        wrong.update(at for at, generation in generations if generation > NEWEST_GENERATION)
    key_sizes = data[OFFSETS.key_size :: RECORD_NBYTES]
    parent_sizes = data[OFFSETS.parent_size :: RECORD_NBYTES]
    usual_parents = parent_sizes.count(FIELD_NBYTES) + parent_sizes.count(0)
    if key_sizes.count(FIELD_NBYTES) + usual_parents == 2 * len(records):
        return wrong
    for at, sizes in enumerate(zip(key_sizes, parent_sizes, strict=True)):
        if sizes in _USUAL_SIZES:
            continue
        whole = data[at * RECORD_NBYTES : (at + 1) * RECORD_NBYTES]
        record = unpack_record(whole, records.slots[at], slot_nbytes)
        if record is None:
            wrong.add(at)
        else:
            records.keys[at], records.parents[at] = record.key, record.parent or None
    return wrong


def _numbers(data: bytearray, offset: int, nbytes: int) -> array[int]:
    """Return the number of ``nbytes`` bytes at ``offset`` of each record."""
    numbers = array("Q")
    columns = bytearray(len(data) // RECORD_NBYTES * numbers.itemsize)
    for at in range(nbytes):
        columns[at :: numbers.itemsize] = data[offset + at :: RECORD_NBYTES]
    numbers.frombytes(columns)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
