"""Blocks on a disk: there after a restart, gone when not to be trusted, no more than asked for."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache.sizes import DiskSize
from kvcache.testing import TierTests, block_of, keys_of
from kvcache.tiers import disk
from kvcache.tiers.disk import PAGE, DiskTier

RECORD = 128


def capacity(slots: int, slot_nbytes: int = PAGE) -> DiskSize:
    return DiskSize(PAGE + slots * (slot_nbytes + RECORD))


def opened(path: Path, slots: int = 8, **options: Any) -> DiskTier:
    return DiskTier(block_nbytes=PAGE, path=str(path), capacity=capacity(slots), **options)


def blocks(keys: list[bytes], nbytes: int = PAGE) -> list[memoryview]:
    return [memoryview(block_of(key, nbytes)) for key in keys]


def held(tier: DiskTier, keys: list[bytes]) -> list[bool]:
    """Which of ``keys`` are there; those that are have their own bytes."""
    buffers = [bytearray(PAGE) for _ in keys]
    written = tier.load(keys, [memoryview(buffer) for buffer in buffers])
    for key, nbytes, buffer in zip(keys, written, buffers, strict=True):
        assert nbytes in (0, PAGE)
        assert not nbytes or buffer == block_of(key, PAGE)
    return [bool(nbytes) for nbytes in written]


class TestDiskTier(TierTests):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DiskTier]:
        with closing(opened(tmp_path / "kv", self.room_blocks)) as tier:
            yield tier


class TestValuesThatAreNotWholePages(TierTests):
    block_nbytes = PAGE + 77

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DiskTier]:
        size = capacity(self.room_blocks, 2 * PAGE)
        with closing(
            DiskTier(block_nbytes=self.block_nbytes, path=str(tmp_path), capacity=size)
        ) as tier:
            yield tier


class TestWithoutDirectInputAndOutput(TestDiskTier):
    @pytest.fixture(autouse=True)
    def _buffered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> int:
            raise OSError(errno.EINVAL, "no direct I/O here")

        read = os.preadv
        monkeypatch.setattr(
            os, "preadv", lambda *of: (monkeypatch.setattr(os, "preadv", read), refuse())[1]
        )


def test_a_restart_finds_every_block(tmp_path: Path) -> None:
    keys = keys_of("a", 6)
    with closing(opened(tmp_path)) as tier:
        assert tier.store(keys, blocks(keys)) == [True] * 6
        tier.remove(keys[2:3])
    with closing(opened(tmp_path)) as tier:
        assert held(tier, keys) == [True, True, False, True, True, True]
        more = keys_of("b", 4)
        assert tier.store(more, blocks(more)) == [True] * 4
        tier._index.check()
    with closing(opened(tmp_path)) as tier:
        assert held(tier, more) == [True] * 4


def test_when_it_is_full_the_tail_of_the_oldest_goes(tmp_path: Path) -> None:
    old, new = keys_of("old", 4), keys_of("new", 2)
    with closing(opened(tmp_path, 4)) as tier:
        tier.store(old, blocks(old))
        assert tier.store(new, blocks(new)) == [True, True]
        assert held(tier, old) == [True, True, False, False]
        used = sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512
        assert used <= capacity(4) + 2 * PAGE  # the lock and a file's own rounding


def test_blocks_read_in_any_order_can_still_leave(tmp_path: Path) -> None:
    old, new = keys_of("old", 2), keys_of("new", 2)
    with closing(opened(tmp_path, 2)) as tier:
        tier.store(old, blocks(old))
        assert held(tier, old[::-1]) == [True, True]
        assert tier.store(new, blocks(new)) == [True, True]


def test_aligned_memory_is_read_and_written_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmap

    keys = keys_of("a", 2)
    memory = memoryview(mmap.mmap(-1, 2 * PAGE))
    views = [memory[:PAGE], memory[PAGE:]]
    for key, view in zip(keys, views, strict=True):
        view[:] = block_of(key, PAGE)
    with closing(opened(tmp_path)) as tier:
        monkeypatch.setattr(tier, "_bounces", None)
        assert tier.store(keys, views) == [True, True]
        memory[:] = bytes(2 * PAGE)
        assert tier.load(keys, views) == [PAGE, PAGE]
    assert [bytes(view) for view in views] == [block_of(key, PAGE) for key in keys]


WRITER = """
import sys
from pathlib import Path
from tests.tiers.test_disk import blocks, keys_of, opened
tier, turn = opened(Path(sys.argv[1])), 0
print("go", flush=True)
while True:
    keys = keys_of(f"{sys.argv[2]}/{turn % 40}", 3)
    tier.store(keys, blocks(keys))
    turn += 1
"""


def test_a_writer_that_is_killed_leaves_whole_blocks(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for life in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(life)],
            stdout=subprocess.PIPE,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        records = tmp_path / "records"
        before = records.read_bytes()
        while records.read_bytes() == before:
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with closing(opened(tmp_path)) as tier:
            tier._index.check()
            names = [f"{old}/{turn}" for old in range(life + 1) for turn in range(40)]
            assert any(held(tier, [key for name in names for key in keys_of(name, 3)]))


def test_one_directory_is_one_tiers(tmp_path: Path) -> None:
    with closing(opened(tmp_path)), pytest.raises(ValueError, match=f"process {os.getpid()} has"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "new" / "kv")):
        assert (tmp_path / "new" / "kv").stat().st_mode & 0o777 == 0o700
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "new" / "kv").iterdir()}
        assert modes == {0o600}


@pytest.mark.parametrize("at", range(0, RECORD, 3))
def test_a_record_that_was_changed_is_no_block(tmp_path: Path, at: int) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    records = tmp_path / "records"
    data = bytearray(records.read_bytes())
    data[PAGE + RECORD + at] ^= 0x10
    records.write_bytes(data)
    with closing(opened(tmp_path)) as tier:
        tier._index.check()
        used = disk._RECORD.size + 4
        assert held(tier, keys) == [True, at >= used, True]


@pytest.mark.parametrize("name", ["records", "blocks"])
def test_files_cut_short_or_foreign(tmp_path: Path, name: str) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    (tmp_path / "somebody else's").write_text("kept")
    for content in (b"", b"garbage" * 1000):
        (tmp_path / name).write_bytes(content)
        with closing(opened(tmp_path)) as tier:
            tier._index.check()
            if name == "records":
                assert held(tier, keys) == [False] * 3
            assert tier.store(keys, blocks(keys)) == [True] * 3
            tier.remove(keys)
            assert tier.store(keys, blocks(keys)) == [True] * 3
            assert held(tier, keys) == [True] * 3
    assert (tmp_path / "somebody else's").read_text() == "kept"


def test_another_geometry_starts_empty(tmp_path: Path) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    with closing(opened(tmp_path, 5)) as tier:
        assert held(tier, keys) == [False] * 3
        assert tier.store(keys, blocks(keys)) == [True] * 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ENOENT])
def test_what_the_disk_will_not_do_is_declined_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    keys = keys_of("a", 3)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with closing(opened(tmp_path)) as tier:
        assert tier.store(keys[:1], blocks(keys[:1])) == [True]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            patch.setattr(os, "preadv", fail)
            assert tier.store(keys[1:], blocks(keys[1:])) == [False, False]
            assert held(tier, keys) == [False] * 3
        assert len(caplog.records) == 2
        tier._index.check()
        assert tier.store(keys, blocks(keys)) == [True] * 3
        assert held(tier, keys) == [True] * 3


def test_a_value_that_is_too_large_is_declined(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(opened(tmp_path)) as tier:
        assert tier.store(keys, [memoryview(bytes(PAGE + 1)), *blocks(keys[1:])]) == [False, True]
        assert tier.load(keys[1:], [memoryview(bytearray(PAGE - 1))]) == [0]


def test_after_close_nothing_is_held_or_taken(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    tier = opened(tmp_path)
    tier.store(keys, blocks(keys))
    tier.close()
    assert tier.contains(keys) == tier.store(keys, blocks(keys)) == held(tier, keys) == [False] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"capacity": DiskSize(PAGE)}, "one block takes 4096"),
        ({"capacity": DiskSize(1 << 60)}, "are free"),
        ({"threads": 0}, "threads is 0"),
        ({"path": "/dev/null/kv"}, "which cannot be used"),
        ({"path": "/proc/kv"}, "which cannot be used"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    usual = {"block_nbytes": PAGE, "path": str(tmp_path), "capacity": capacity(4)}
    given: dict[str, Any] = usual | options
    with pytest.raises(ValueError, match=says):
        DiskTier(**given)
    opened(tmp_path).close()  # nothing was left locked


def test_many_threads(tmp_path: Path) -> None:
    chains = [keys_of(f"chain {at}", 4) for at in range(12)]
    with closing(opened(tmp_path, 40)) as tier:

        def user(seed: int) -> int:
            found = 0
            for turn in range(60):
                keys = chains[(seed * 7 + turn * 5) % len(chains)]
                found += sum(held(tier, keys))
                tier.store(keys, blocks(keys))
                found += sum(held(tier, keys))  # by now the others cannot have pushed all out
                if turn % 9 == seed:
                    tier.remove(keys[2:])
            return found

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(user, range(6))) > 0
        tier._index.check()
        assert tier._index.pinned_slots == 0
