"""DiskReader, find_owner and shortage: they read a tier's directory and change nothing."""

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
from kvcache.tiers.disk.record_file import RECORD_NBYTES, Record
from tests.support.disk_tiers import RECORD_USED_NBYTES, blocks_of, open_disk

KEYS = keys_of("read", 5)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    """An open tier with a chain of three blocks."""
    with closing(open_disk(tmp_path)) as tier:
        tier.store(KEYS[:3], blocks_of(KEYS[:3]))
        yield tier


def load(reader: DiskReader, keys: list[bytes]) -> list[bytes]:
    buffers = [bytearray(PAGE) for _ in keys]
    lengths = reader.load(keys, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer[:n]) for buffer, n in zip(buffers, lengths, strict=True)]


def snapshot(path: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return the content, modification time and mode of each file."""
    return {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_mode)
        for file in path.iterdir()
    }


def test_reader_of_open_tier_loads_all_blocks_and_changes_nothing(
    tier: DiskTier, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    with closing(DiskReader(tmp_path)) as reader:
        assert [(record.key, record.parent) for record in reader] == [
            (KEYS[0], b""), (KEYS[1], KEYS[0]), (KEYS[2], KEYS[1]),
        ]  # fmt: skip
        assert reader.geometry == (PAGE, 8)
        assert reader.contains(KEYS) == [True] * 3 + [False] * 2
        assert load(reader, KEYS) == [block_of(key, PAGE) for key in KEYS[:3]] + [b"", b""]
        assert reader.store(KEYS[3:], blocks_of(KEYS[3:])) == [False, False]
        reader.remove(KEYS)
        assert load(reader, KEYS[:1]) == [block_of(KEYS[0], PAGE)]
        assert all(map(reader.is_unchanged, KEYS[:3]))
    assert snapshot(tmp_path) == before
    assert tier.contains(KEYS[:3]) == [True] * 3


def test_reader_load_of_block_removed_since_misses(tier: DiskTier, tmp_path: Path) -> None:
    with closing(DiskReader(tmp_path)) as reader:
        tier.remove(KEYS[2:3])
        assert load(reader, KEYS[1:3]) == [block_of(KEYS[1], PAGE), b""]
        assert list(map(reader.is_unchanged, KEYS[1:3])) == [True, False]


def test_reader_load_of_slot_written_during_the_read_misses(
    tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of the new block, and must not be returned for the old one."""
    pread = os.preadv

    def write_then_read(*arguments: object) -> int:
        monkeypatch.setattr(os, "preadv", pread)
        tier.remove(KEYS[:3])
        tier.store(KEYS[3:], blocks_of(KEYS[3:]))
        return pread(*arguments)  # type: ignore[arg-type]

    with closing(DiskReader(tmp_path)) as reader:
        monkeypatch.setattr(os, "preadv", write_then_read)
        assert load(reader, KEYS[:3]) == [b"", b"", b""]
        assert not any(map(reader.is_unchanged, KEYS[:3]))


def test_reader_load_beyond_end_of_file_misses(tier: DiskTier, tmp_path: Path) -> None:
    os.truncate(tmp_path / "blocks", 2 * PAGE)
    with closing(DiskReader(tmp_path)) as reader:
        assert b"" in load(reader, KEYS[:3])
        assert all(map(reader.is_unchanged, KEYS[:3]))


def test_reader_with_two_records_of_one_key_uses_the_newer(tier: DiskTier, tmp_path: Path) -> None:
    tier.records.write(Record(99, 7, PAGE, KEYS[0], b""))
    with closing(DiskReader(tmp_path)) as reader:
        assert len(reader) == 3
        assert [record.slot for record in reader if record.key == KEYS[0]] == [7]


def test_reader_ignores_records_that_do_not_verify(tier: DiskTier, tmp_path: Path) -> None:
    with (tmp_path / "records").open("r+b") as file:
        file.seek(PAGE + RECORD_NBYTES + RECORD_USED_NBYTES - 4)  # the checksum of the second
        file.write(b"\xff\xff\xff")
    with closing(DiskReader(tmp_path)) as reader:
        assert len(reader) == 2


@pytest.mark.parametrize("page", [b"", b"kvcdisk1" + bytes(16), b"kvcdisk2" + b"\xff" * 16])
def test_reader_of_foreign_records_file_raises_value_error(
    page: bytes, tier: DiskTier, tmp_path: Path
) -> None:
    (tmp_path / "records").write_bytes(page)
    with pytest.raises(ValueError, match="no disk tier that this version can read"):
        DiskReader(tmp_path)


def test_reader_of_empty_directory_raises_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        DiskReader(tmp_path)
    assert not list(tmp_path.iterdir())


def test_reader_after_close_or_failure_has_no_open_file(tier: DiskTier, tmp_path: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    with closing(DiskReader(tmp_path)):
        assert open_files() == before + 3
    (tmp_path / "records").write_bytes(b"")
    with pytest.raises(ValueError, match="no disk tier"):
        DiskReader(tmp_path)
    assert open_files() == before


def test_find_owner_returns_the_process_that_has_the_tier_open(tmp_path: Path) -> None:
    assert find_owner(tmp_path) is None
    with closing(open_disk(tmp_path / "a")), closing(open_disk(tmp_path / "b")):
        assert find_owner(tmp_path / "a") == os.getpid()
    assert find_owner(tmp_path / "a") is None


def test_shortage_counts_free_space_and_the_tiers_own_files(tier: DiskTier, tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    free = space.f_bavail * space.f_frsize
    assert shortage(tmp_path, free // 2) is None
    assert "are free" in str(shortage(tmp_path, 2 * free + (1 << 30)))


def test_reader_of_sparse_records_file_skips_holes(tier: DiskTier, tmp_path: Path) -> None:
    """The file has 8 TiB, and three records."""
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


def test_reader_of_slot_larger_than_memory_raises_value_error(
    tier: DiskTier, tmp_path: Path
) -> None:
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
