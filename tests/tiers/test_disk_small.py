"""DiskTier on small file systems that are full or become read-only; needs the right to mount."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from tests.support.disk_tiers import blocks_of, load_hits, open_disk

SLOTS = 20


def run(*command: str) -> bool:
    return not subprocess.run(command, check=False, capture_output=True).returncode


@pytest.fixture(params=["tmpfs", "ext4"])
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system with less than 8 MiB: in memory, or in a file."""
    path, image = tmp_path / "small", tmp_path / "image"
    path.mkdir()
    if request.param == "tmpfs":
        ready = run("mount", "-t", "tmpfs", "-o", "size=256k", "none", str(path))
    else:
        with image.open("wb") as file:
            file.truncate(8 << 20)
        ready = (
            shutil.which("mkfs.ext4") is not None
            and run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", str(image))
            and run("mount", "-o", "loop", str(image), str(path))
        )
    if not ready:
        pytest.skip(f"this user cannot mount a small {request.param}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # also with an open file


def fill(path: Path) -> None:
    """Fill the file system with another file."""
    try:
        with (path / "other").open("wb", buffering=0) as other:
            while True:
                other.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def test_disk_opened_on_full_file_system_raises_value_error(small: Path) -> None:
    fill(small)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot be used: .*No space left|are free"):
            open_disk(small / "kv", SLOTS)
    (small / "other").unlink()
    open_disk(small / "kv", SLOTS).close()


def test_disk_on_file_system_filled_after_start_stores_up_to_capacity(small: Path) -> None:
    keys = keys_of("a", 3 * SLOTS)
    with closing(open_disk(small / "kv", SLOTS)) as tier:
        fill(small)
        for at in range(0, len(keys), SLOTS):
            piece = keys[at : at + SLOTS]
            assert tier.store(piece, blocks_of(piece)) == [True] * SLOTS
            assert load_hits(tier, piece) == [True] * SLOTS
    with closing(open_disk(small / "kv", SLOTS)) as tier:  # its own files count as room
        assert load_hits(tier, piece) == [True] * SLOTS
    with pytest.raises(ValueError, match=r"needs .*KiB at .*, but only .*KiB are free"):
        open_disk(small / "kv", SLOTS + 20)
    open_disk(small / "kv", SLOTS).close()


def test_disk_opened_on_read_only_file_system_raises_value_error(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(ValueError, match=r"cannot be used: .*Read-only"):
        open_disk(small / "kv", SLOTS)


@pytest.mark.parametrize("small", ["ext4"], indirect=True)
def test_disk_on_file_system_that_becomes_read_only_keeps_its_blocks(small: Path) -> None:
    """ext4 makes itself read-only when its disk fails."""
    old, new = keys_of("old", SLOTS), keys_of("new", 5)
    with closing(open_disk(small / "kv", SLOTS)) as tier:
        assert all(tier.store(old, blocks_of(old)))
        os.sync()
        subprocess.run(["mount", "-o", "remount,abort", str(small)], check=True)
        assert tier.store(new, blocks_of(new)) == [False] * 5
        assert load_hits(tier, new) == [False] * 5
        assert load_hits(tier, old) == [True] * SLOTS
        tier.remove(old[:1])
        assert tier.contains(old[:2]) == [False, True]
        assert tier.index.pinned_slots == 0
        tier.index.check()
    with pytest.raises(ValueError, match=r"cannot be used: .*Read-only"):
        open_disk(small / "kv", SLOTS)
