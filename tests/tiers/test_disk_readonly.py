"""DiskTier on a disk that rejects writes: it keeps its blocks and declines new ones."""

import errno
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache.testing import keys_of
from tests.support.disk_tiers import blocks_of, load_hits, open_disk

NO_WRITE_ERRORS = [errno.EROFS, errno.ENOSPC, errno.EDQUOT]


def fail_with(code: int) -> Any:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", NO_WRITE_ERRORS)
def test_disk_when_writes_fail_keeps_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = keys_of("old", 8), keys_of("new", 30)
    with closing(open_disk(tmp_path)) as tier:
        assert all(tier.store(old, blocks_of(old)))
        with monkeypatch.context() as patch:
            for call in ("pwrite", "pwritev"):
                patch.setattr(os, call, fail_with(code))
            for at in range(0, 30, 3):
                piece = new[at : at + 3]
                assert tier.store(piece, blocks_of(piece)) == [False] * 3
                assert all(tier.contains(old))
            assert all(load_hits(tier, old))
            assert tier.usage().evicted_blocks == 0
            assert tier.usage().declined_blocks == {"error": 30}
        assert len(caplog.records) == 1
        assert tier.store(new[:3], blocks_of(new[:3])) == [True] * 3
        assert sum(load_hits(tier, old)) == 5
        tier.index.check()


@pytest.mark.parametrize("code", NO_WRITE_ERRORS)
def test_disk_when_only_writes_of_blocks_fail_evicts_for_one_call_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On a file system that shares space, small writes can succeed where large ones fail."""
    old, new = keys_of("old", 8), keys_of("new", 30)
    with closing(open_disk(tmp_path)) as tier:
        assert all(tier.store(old, blocks_of(old)))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail_with(code))
            for at in range(0, 30, 5):
                piece = new[at : at + 5]
                assert tier.store(piece[:2], blocks_of(piece[:2])) == [False] * 2
                assert tier.store(piece, blocks_of(piece)) == [False] * 5
                assert sum(load_hits(tier, old)) == 6
        assert tier.store(new[:5], blocks_of(new[:5])) == [True] * 2 + [False] * 3
        assert tier.store(new[:5], blocks_of(new[:5])) == [True] * 5
        assert sum(load_hits(tier, old)) == 3
        tier.index.check()


def test_disk_with_one_unwritable_slot_uses_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one slot does not stop evictions from other slots."""
    old, new = keys_of("old", 8), keys_of("new", 8)
    real = os.pwritev

    def fail_at_slot_3(file: int, buffers: Any, at: int) -> int:
        if at == 3 * 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, at)

    monkeypatch.setattr(os, "pwritev", fail_at_slot_3)
    with closing(open_disk(tmp_path)) as tier:
        assert sum(tier.store(old, blocks_of(old))) == 7
        for _ in range(3):
            tier.store(new, blocks_of(new))
        assert sum(tier.contains(new)) == 7
