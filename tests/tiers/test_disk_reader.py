"""A disk tier read from outside: what it has, while it is open too; nothing is changed by it."""

import os
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import block_of, keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from kvcache.tiers.disk.directory import shortage
from kvcache.tiers.disk.lock_file import find_owner
from kvcache.tiers.disk.reader import DiskReader
from kvcache.tiers.disk.record_file import Record
from tests.tiers.test_disk import RECORD, USED, blocks, opened

KEYS = keys_of("read", 5)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    """A tier that is open, with three blocks that continue each other."""
    with closing(opened(tmp_path)) as tier:
        tier.store(KEYS[:3], blocks(KEYS[:3]))
        yield tier


def read(reader: DiskReader, keys: list[bytes]) -> list[bytes]:
    buffers = [bytearray(PAGE) for _ in keys]
    lengths = reader.load(keys, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer[:n]) for buffer, n in zip(buffers, lengths, strict=True)]


def everything(path: Path) -> dict[str, tuple[bytes, int, int]]:
    """All that is in the directory, and when it was last changed."""
    return {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_mode)
        for file in path.iterdir()
    }


def test_all_is_read_beside_the_owner_and_nothing_changes(tier: DiskTier, tmp_path: Path) -> None:
    before = everything(tmp_path)
    with closing(DiskReader(tmp_path)) as reader:
        assert [(record.key, record.parent) for record in reader] == [
            (KEYS[0], b""), (KEYS[1], KEYS[0]), (KEYS[2], KEYS[1]),
        ]  # fmt: skip
        assert reader.geometry == (PAGE, 8)
        assert reader.contains(KEYS) == [True] * 3 + [False] * 2
        assert read(reader, KEYS) == [block_of(key, PAGE) for key in KEYS[:3]] + [b"", b""]
        assert reader.store(KEYS[3:], blocks(KEYS[3:])) == [False, False]
        reader.remove(KEYS)
        assert read(reader, KEYS[:1]) == [block_of(KEYS[0], PAGE)]
        assert all(map(reader.is_unchanged, KEYS[:3]))
    assert everything(tmp_path) == before
    assert tier.contains(KEYS[:3]) == [True] * 3


def test_a_block_that_left_meanwhile_is_none(tier: DiskTier, tmp_path: Path) -> None:
    with closing(DiskReader(tmp_path)) as reader:
        tier.remove(KEYS[2:3])
        assert read(reader, KEYS[1:3]) == [block_of(KEYS[1], PAGE), b""]
        assert list(map(reader.is_unchanged, KEYS[1:3])) == [True, False]


def test_a_slot_written_again_while_it_is_read_is_none(
    tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of the new block, and must not pass for the old one's."""
    pread = os.preadv

    def write_then_read(*arguments: object) -> int:
        monkeypatch.setattr(os, "preadv", pread)
        tier.remove(KEYS[:3])
        tier.store(KEYS[3:], blocks(KEYS[3:]))
        return pread(*arguments)  # type: ignore[arg-type]

    with closing(DiskReader(tmp_path)) as reader:
        monkeypatch.setattr(os, "preadv", write_then_read)
        assert read(reader, KEYS[:3]) == [b"", b"", b""]
        assert not any(map(reader.is_unchanged, KEYS[:3]))


def test_what_the_disk_does_not_give_is_none(tier: DiskTier, tmp_path: Path) -> None:
    os.truncate(tmp_path / "blocks", 2 * PAGE)
    with closing(DiskReader(tmp_path)) as reader:
        found = read(reader, KEYS[:3])
        assert b"" in found
        assert all(map(reader.is_unchanged, KEYS[:3]))


def test_of_two_records_with_one_key_the_newer_counts(tier: DiskTier, tmp_path: Path) -> None:
    tier._records.write(Record(99, 7, PAGE, KEYS[0], b""))
    with closing(DiskReader(tmp_path)) as reader:
        assert len(reader) == 3
        assert [record.slot for record in reader if record.key == KEYS[0]] == [7]


def test_records_that_do_not_verify_are_not_there(tier: DiskTier, tmp_path: Path) -> None:
    with (tmp_path / "records").open("r+b") as file:
        file.seek(PAGE + RECORD + USED - 4)  # the checksum of the second
        file.write(b"\xff\xff\xff")
    with closing(DiskReader(tmp_path)) as reader:
        assert len(reader) == 2


@pytest.mark.parametrize("page", [b"", b"kvcdisk1" + bytes(16), b"kvcdisk2" + b"\xff" * 16])
def test_files_of_something_else_are_refused(page: bytes, tier: DiskTier, tmp_path: Path) -> None:
    (tmp_path / "records").write_bytes(page)
    with pytest.raises(ValueError, match="no disk tier that this version can read"):
        DiskReader(tmp_path)


def test_an_empty_directory_is_refused_and_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        DiskReader(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_reader_leaves_no_file_open(tier: DiskTier, tmp_path: Path) -> None:
    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = files()
    with closing(DiskReader(tmp_path)):
        assert files() == before + 3
    (tmp_path / "records").write_bytes(b"")
    with pytest.raises(ValueError, match="no disk tier"):
        DiskReader(tmp_path)
    assert files() == before


def test_who_has_it_open_is_seen_without_a_lock(tmp_path: Path) -> None:
    assert find_owner(tmp_path) is None
    with closing(opened(tmp_path / "a")), closing(opened(tmp_path / "b")):
        assert find_owner(tmp_path / "a") == os.getpid()
    assert find_owner(tmp_path / "a") is None


def test_room_is_what_is_free_and_what_the_tier_has(tier: DiskTier, tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    free = space.f_bavail * space.f_frsize
    assert shortage(tmp_path, free // 2) is None
    assert "are free" in str(shortage(tmp_path, 2 * free + (1 << 30)))


def test_sparse_records_are_read_without_their_holes(tier: DiskTier, tmp_path: Path) -> None:
    """The file has 8 TiB, of which three records are written."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("records", "blocks"):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    with (copy / "records").open("r+b") as file:
        page = bytearray(file.read(24))
        struct.pack_into("<Q", page, 16, 1 << 53)
        file.seek(0)
        file.write(page)
        file.truncate(1 << 43)
    with closing(DiskReader(copy)) as reader:
        assert reader.geometry.slots == 1 << 53
        assert [record.key for record in reader] == KEYS[:3]


def test_a_slot_larger_than_memory_is_one_error(tier: DiskTier, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "records").write_bytes((tmp_path / "records").read_bytes())
    with (copy / "records").open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<Q", 1 << 43))
    with (copy / "blocks").open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(ValueError, match="cannot read a disk tier"):
        DiskReader(copy)
