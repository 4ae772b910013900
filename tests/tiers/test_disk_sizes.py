"""A disk tier's directory of another size than before: what fits is kept."""

from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from tests.tiers.test_disk import RECORD, blocks, capacity, held, opened


def test_disk_tier_whose_records_are_empty_starts_empty(tmp_path: Path) -> None:
    """As after a kill before the first page was written."""
    for content in (b"", bytes(PAGE + RECORD)):
        (tmp_path / "records").write_bytes(content)
        with closing(opened(tmp_path)) as tier:
            assert len(tier._index) == 0
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.parametrize(("slots", "kept"), [(5, 3), (2, 2), (40, 3)])
def test_disk_tier_with_another_capacity_keeps_what_fits(
    tmp_path: Path, slots: int, kept: int
) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    for _ in range(2):
        with closing(opened(tmp_path, slots)) as tier:
            assert held(tier, keys) == [at < kept for at in range(3)]
            used = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
            assert used <= capacity(slots)
    with closing(opened(tmp_path)) as tier:
        assert held(tier, keys) == [at < kept for at in range(3)]
        assert tier.store(keys, blocks(keys)) == [True] * 3


def test_disk_tier_with_another_block_size_starts_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    caplog.set_level("INFO", "kvcache")
    larger = DiskTier(block_nbytes=2 * PAGE, path=str(tmp_path), capacity=capacity(8, 2 * PAGE))
    with closing(larger) as tier:
        assert tier.contains(keys) == [False] * 3
        assert tier.store(keys, blocks(keys)) == [True] * 3
    assert "blocks of another format or block size deleted" in caplog.text
