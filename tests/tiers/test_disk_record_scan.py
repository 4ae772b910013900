"""The scan of all records finds the same as a read of each record."""

import os
import tempfile
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.tiers.disk import PAGE
from kvcache.tiers.disk.record_file import (
    RECORD_NBYTES,
    Geometry,
    Record,
    RecordFile,
    file_nbytes,
    read_record,
)
from kvcache.tiers.disk.record_scan import read_columns

FORMS = st.tuples(
    st.sampled_from([0, 64, 64, 64, 64, 66, 80, 20]),  # bytes of the key; 0: no block
    st.sampled_from([64, 64, 0, 66, 30]),  # bytes of the parent's key
    st.sampled_from([0, 0, 0, 0, 1, 21, 64, 152, 160, 255]),  # which byte is damaged; 0: none
    st.sampled_from([0, 0, 0, 0, 0, 1]),  # how far the record's slot number is off
    st.sampled_from([PAGE, PAGE, 0, 77, PAGE + 1]),  # bytes of the block; a slot has a page
)


def written(path: Path, forms: Sequence[tuple[int, int, int, int, int]]) -> tuple[int, Geometry]:
    """Write a record of each form; return a descriptor of the file."""
    geometry = Geometry(PAGE, len(forms))
    fd = os.open(path / "records", os.O_RDWR | os.O_CREAT)
    blocks_fd = os.open(path / "blocks", os.O_RDWR | os.O_CREAT)
    file = RecordFile(fd, *geometry, blocks_fd)
    os.close(blocks_fd)
    for slot, (key_nbytes, parent_nbytes, damaged, shift, nbytes) in enumerate(forms):
        if not key_nbytes:
            continue
        key = slot.to_bytes(4, "big").rjust(key_nbytes, b"k")
        file.write(Record(len(forms) - slot, slot, nbytes, key, b"p" * parent_nbytes))
        record = bytearray(os.pread(fd, RECORD_NBYTES, file_nbytes(slot)))
        record[damaged] ^= 1 if damaged else 0
        os.pwrite(fd, record, file_nbytes(slot + shift) % file_nbytes(len(forms)) or PAGE)
    return fd, geometry


@given(forms=st.lists(FORMS, min_size=1, max_size=40))
def test_read_columns_finds_what_read_record_finds(
    forms: list[tuple[int, int, int, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fd, geometry = written(Path(folder), forms)
        single = [read_record(fd, geometry, slot) for slot in range(len(forms))]
        columns = read_columns(fd, geometry)
        os.close(fd)
    assert list(columns) == [record for record in single if record is not None]
    assert [columns.slots[at] for at in columns.by_age()] == sorted(columns.slots, reverse=True)
    by_slot = columns.nbytes_by_slot(len(forms))
    assert list(by_slot) == [0 if record is None else record.nbytes for record in single]


@pytest.mark.parametrize("distance", [1, 7, 1023, 1024, 2999])
def test_read_columns_misses_equal_damage_of_two_records(tmp_path: Path, distance: int) -> None:
    """A CRC over several records must not be cancelled out by equal damage."""
    forms = list(repeat((64, 64, 0, 0, PAGE), 3000))
    forms[0] = forms[distance] = (64, 64, 90, 0, PAGE)
    fd, geometry = written(tmp_path, forms)
    slots = read_columns(fd, geometry).slots
    os.close(fd)
    assert sorted({*range(3000)}.difference(slots)) == [0, distance]
