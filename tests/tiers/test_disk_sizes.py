"""DiskTier opened with other sizes than before: it keeps the blocks that fit."""

from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from kvcache.tiers.disk.record_file import RECORD_NBYTES
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
