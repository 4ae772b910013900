"""DiskTier opened with other sizes than before, and keys and blocks that are too large for it."""

from contextlib import closing
from pathlib import Path

import pytest

from kvcache.keys import MAX_KEY_NBYTES
from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from kvcache.tiers.disk.record_file import KEY_NBYTES, RECORD_NBYTES
from tests.support.disk_tiers import blocks_of, capacity_for, load_hits, open_disk


def test_disk_with_empty_records_file_starts_empty(tmp_path: Path) -> None:
    """A kill before the first page was written leaves such a file."""
    for content in (b"", bytes(PAGE + RECORD_NBYTES)):
        (tmp_path / "records").write_bytes(content)
        with closing(open_disk(tmp_path)) as tier:
            assert len(tier.index) == 0
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.parametrize(("slots", "kept"), [(5, 3), (2, 2), (40, 3)])
def test_disk_with_another_capacity_keeps_blocks_that_fit(
    tmp_path: Path, slots: int, kept: int
) -> None:
    keys = keys_of("a", 3)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    for _ in range(2):
        with closing(open_disk(tmp_path, slots)) as tier:
            assert load_hits(tier, keys) == [at < kept for at in range(3)]
            used = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
            assert used <= capacity_for(slots)
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [at < kept for at in range(3)]
        assert tier.store(keys, blocks_of(keys)) == [True] * 3


def test_disk_with_another_block_size_starts_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("a", 3)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    caplog.set_level("INFO", "kvcache")
    larger = DiskTier(block_nbytes=2 * PAGE, path=str(tmp_path), capacity=capacity_for(8, 2 * PAGE))
    with closing(larger) as tier:
        assert tier.contains(keys) == [False] * 3
        assert tier.store(keys, blocks_of(keys)) == [True] * 3
    assert "blocks of another format or block size deleted" in caplog.text


# Keys and blocks that a record or a slot cannot hold


def test_disk_logs_the_first_key_and_the_first_block_that_it_declines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_disk(tmp_path / "kv")) as tier:
        for nbytes in (KEY_NBYTES + 1, KEY_NBYTES + 9):
            keys = [*keys_of("long", 1, nbytes), *keys_of("short", 1)]
            assert tier.store(keys, blocks_of(keys)) == [False, True]
            assert load_hits(tier, keys) == [False, True]
        for extra in (1, 2):
            keys = keys_of("large", 1)
            assert tier.store(keys, [memoryview(bytes(PAGE + extra))]) == [False]
    start = f"kvcache: disk tier at {tmp_path / 'kv'}: a"
    key, block = (record.getMessage() for record in caplog.records)
    assert (
        key == f"{start} key has 81 bytes (a record holds 80); blocks with longer keys are declined"
    )
    assert block == f"{start} block has 4097 bytes (a slot holds 4096); larger blocks are declined"


def test_disk_reopened_finds_a_block_with_a_parent_that_is_too_long(tmp_path: Path) -> None:
    keys = keys_of("child", 2)
    for nbytes in (KEY_NBYTES + 1, 300):
        [parent] = keys_of("parent", 1, nbytes)
        with closing(open_disk(tmp_path / f"{nbytes}")) as tier:
            assert tier.store(keys, blocks_of(keys), parent) == [True, True]
        with closing(open_disk(tmp_path / f"{nbytes}")) as tier:
            assert load_hits(tier, keys) == [True, True]


def test_records_of_the_disk_hold_every_key_of_the_contract() -> None:
    assert KEY_NBYTES >= MAX_KEY_NBYTES
