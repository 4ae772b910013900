"""A disk that takes no more writes: blocks that are there stay, and new ones are declined."""

import errno
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache.testing import keys_of
from tests.tiers.test_disk import blocks, held, opened

TAKES_NOTHING = [errno.EROFS, errno.ENOSPC, errno.EDQUOT]


def fail_with(code: int) -> Any:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", TAKES_NOTHING)
def test_disk_tier_on_a_disk_that_becomes_read_only_keeps_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = keys_of("old", 8), keys_of("new", 30)
    with closing(opened(tmp_path)) as tier:
        assert all(tier.store(old, blocks(old)))
        with monkeypatch.context() as patch:
            for call in ("pwrite", "pwritev"):
                patch.setattr(os, call, fail_with(code))
            for at in range(0, 30, 3):
                piece = new[at : at + 3]
                assert tier.store(piece, blocks(piece)) == [False] * 3
                assert all(tier.contains(old))
            assert all(held(tier, old))
            assert tier.usage().evicted_blocks == 0
        assert len(caplog.records) == 1
        assert tier.store(new[:3], blocks(new[:3])) == [True] * 3
        assert sum(held(tier, old)) == 5
        tier._index.check()


@pytest.mark.parametrize("code", TAKES_NOTHING)
def test_disk_tier_whose_writes_of_blocks_fail_loses_those_of_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As on a file system that shares space: small writes succeed, and those of blocks do not."""
    old, new = keys_of("old", 8), keys_of("new", 30)
    with closing(opened(tmp_path)) as tier:
        assert all(tier.store(old, blocks(old)))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail_with(code))
            for at in range(0, 30, 5):
                piece = new[at : at + 5]
                assert tier.store(piece[:2], blocks(piece[:2])) == [False] * 2
                assert tier.store(piece, blocks(piece)) == [False] * 5
                assert sum(held(tier, old)) == 6
        assert tier.store(new[:5], blocks(new[:5])) == [True] * 2 + [False] * 3
        assert tier.store(new[:5], blocks(new[:5])) == [True] * 5
        assert sum(held(tier, old)) == 3
        tier._index.check()


def test_disk_tier_with_one_bad_slot_uses_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one place is none of the disk: the blocks of others leave for new ones."""
    old, new = keys_of("old", 8), keys_of("new", 8)
    real = os.pwritev

    def bad(file: int, buffers: Any, at: int) -> int:
        if at == 3 * 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, at)

    monkeypatch.setattr(os, "pwritev", bad)
    with closing(opened(tmp_path)) as tier:
        assert sum(tier.store(old, blocks(old))) == 7
        for _ in range(3):
            tier.store(new, blocks(new))
        assert sum(tier.contains(new)) == 7
