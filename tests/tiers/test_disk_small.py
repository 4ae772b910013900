"""File systems that are full or become read-only under a disk tier; for who may mount them."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from tests.tiers.test_disk import blocks, held, opened

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
        pytest.skip(f"only who may mount can have a small {request.param}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # also with a file left open


def fill(path: Path) -> None:
    """Leave no room, as somebody else who writes to the same disk."""
    try:
        with (path / "other").open("wb", buffering=0) as other:
            while True:
                other.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def test_a_disk_that_is_full_before_start_is_no_place(small: Path) -> None:
    fill(small)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot be used: .*No space left|are free"):
            opened(small / "kv", SLOTS)
    (small / "other").unlink()
    opened(small / "kv", SLOTS).close()


def test_a_disk_that_is_full_after_start_takes_what_was_promised(small: Path) -> None:
    keys = keys_of("a", 3 * SLOTS)
    with closing(opened(small / "kv", SLOTS)) as tier:
        fill(small)
        for at in range(0, len(keys), SLOTS):
            now = keys[at : at + SLOTS]
            assert tier.store(now, blocks(now)) == [True] * SLOTS
            assert held(tier, now) == [True] * SLOTS
    with closing(opened(small / "kv", SLOTS)) as tier:  # what it had counts as room
        assert held(tier, now) == [True] * SLOTS
    with pytest.raises(ValueError, match=r"asks for .*KiB at .*, where .*KiB are free"):
        opened(small / "kv", SLOTS + 20)
    opened(small / "kv", SLOTS).close()


def test_a_read_only_file_system_is_no_place(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(ValueError, match=r"cannot be used: .*Read-only"):
        opened(small / "kv", SLOTS)


@pytest.mark.parametrize("small", ["ext4"], indirect=True)
def test_a_file_system_that_becomes_read_only(small: Path) -> None:
    """As ext4 makes itself when the disk below fails: it declines, and all that is there stays."""
    old, new = keys_of("old", SLOTS), keys_of("new", 5)
    with closing(opened(small / "kv", SLOTS)) as tier:
        assert all(tier.store(old, blocks(old)))
        os.sync()
        subprocess.run(["mount", "-o", "remount,abort", str(small)], check=True)
        assert tier.store(new, blocks(new)) == [False] * 5
        assert held(tier, new) == [False] * 5
        assert held(tier, old) == [True] * SLOTS
        tier.remove(old[:1])
        assert tier.contains(old[:2]) == [False, True]
        assert tier._index.pinned_slots == 0
        tier._index.check()
    with pytest.raises(ValueError, match=r"cannot be used: .*Read-only"):
        opened(small / "kv", SLOTS)
