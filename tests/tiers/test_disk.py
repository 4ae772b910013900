"""Blocks on a disk: there after a restart, gone when not to be trusted, no more than asked for."""

import errno
import fcntl
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from kvcache.eviction import POLICIES
from kvcache.sizes import DiskSize
from kvcache.testing import TierTests, block_of, keys_of
from kvcache.tiers.disk import PAGE, DiskTier

RECORD = 256
USED = 154
BESIDE = 3 * PAGE  # the lock, the geometry, the rest of the last page of records


def capacity(slots: int, slot_nbytes: int = PAGE) -> DiskSize:
    return DiskSize(BESIDE + slots * (slot_nbytes + RECORD))


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
    @pytest.fixture(autouse=True, params=[errno.EINVAL, errno.EOPNOTSUPP])
    def _buffered(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        def refuse(*_: object) -> int:
            raise OSError(request.param, "no direct I/O here")

        read = os.preadv
        monkeypatch.setattr(
            os, "preadv", lambda *of: (monkeypatch.setattr(os, "preadv", read), refuse())[1]
        )


class TestOnAFileSystemInMemory(TestDiskTier):
    @pytest.fixture
    def tier(self) -> Iterator[DiskTier]:
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("there is no /dev/shm to write to")
        with (
            tempfile.TemporaryDirectory(dir="/dev/shm") as path,
            closing(opened(Path(path), self.room_blocks)) as tier,
        ):
            yield tier


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


@pytest.mark.parametrize("eviction", POLICIES)
def test_the_order_of_leaving_outlives_a_restart(tmp_path: Path, eviction: str) -> None:
    first, second, new = keys_of("first", 3), keys_of("second", 3), keys_of("new", 6)
    with closing(opened(tmp_path, 6, eviction=eviction)) as tier:
        tier.store(first, blocks(first))
        tier.store(second, blocks(second))
    with closing(opened(tmp_path, 6, eviction=eviction)) as tier:
        left = []
        for key in new:
            assert tier.store([key], blocks([key])) == [True]
            left.append([old for old in first + second if not tier.contains([old])[0]])
    gone = [*reversed(first), *reversed(second)]
    assert [sorted(each) for each in left] == [sorted(gone[: n + 1]) for n in range(6)]


def test_the_oldest_goes_first_however_often_it_was_restarted(tmp_path: Path) -> None:
    keys = keys_of("a", 10)
    for at in range(0, 10, 2):
        with closing(opened(tmp_path, 4)) as tier:
            for key in keys[at : at + 2]:
                assert tier.store([key], blocks([key])) == [True]
            there = keys[max(0, at - 2) : at + 2]
            assert held(tier, keys) == [key in there for key in keys]


def test_what_was_read_stays_longer(tmp_path: Path) -> None:
    read, other, new = keys_of("a", 3)
    with closing(opened(tmp_path, 2)) as tier:
        for key in (read, other):
            tier.store([key], blocks([key]))
        assert held(tier, [read]) == [True]
        tier.store([new], blocks([new]))
        assert tier.contains([read, other, new]) == [True, False, True]


@pytest.mark.parametrize("eviction", POLICIES)
def test_whatever_the_order_of_reading_blocks_can_leave(tmp_path: Path, eviction: str) -> None:
    old, new = keys_of("old", 8), keys_of("new", 8)
    with closing(opened(tmp_path, eviction=eviction)) as tier:
        tier.store(old, blocks(old))
        for order in (old, old[::3] + old[::2], old[::-1]):
            assert all(held(tier, order))
        for at in range(1, 9):
            tier.store(new[:at], blocks(new[:at]))
            assert tier.contains(new) == [True] * at + [False] * (8 - at)
            assert tier.contains(old) == [True] * (8 - at) + [False] * at


def test_what_is_read_after_a_restart_loses_its_tail_first(tmp_path: Path) -> None:
    old, new = keys_of("old", 4), keys_of("new", 2)
    with closing(opened(tmp_path, 4)) as tier:
        tier.store(old, blocks(old))
    with closing(opened(tmp_path, 4)) as tier:
        assert all(held(tier, old))
        tier.store(new, blocks(new))
        assert tier.contains(old) == [True, True, False, False]


def test_input_and_output_are_direct_where_they_can_be(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as tier:
        try:
            os.close(os.open(tmp_path / "blocks", os.O_RDWR | os.O_DIRECT))
        except OSError:
            pytest.skip("this file system takes no direct I/O")
        assert fcntl.fcntl(tier._files.blocks, fcntl.F_GETFL) & os.O_DIRECT


def test_threads_are_there_from_the_start(tmp_path: Path) -> None:
    """A process that exits can start none."""
    with closing(opened(tmp_path, threads=3)) as tier:
        assert len(tier._pool._threads) == 3


def test_no_more_of_the_disk_is_taken_than_capacity(tmp_path: Path) -> None:
    for slots in (33, 200, 7, 1):
        with closing(opened(tmp_path, slots)) as tier:
            keys = keys_of("a", 2 * slots)
            for at in range(0, len(keys), 5):
                tier.store(keys[at : at + 5], blocks(keys[at : at + 5]))
            used = {file.name: file.stat().st_blocks * 512 for file in tmp_path.iterdir()}
            assert slots * PAGE <= used["blocks"]
            assert PAGE + slots * RECORD <= used["records"]
            assert sum(used.values()) <= capacity(slots)


@pytest.mark.parametrize(("eviction", "turns"), [("lru", 1000), ("fifo", 200), ("s3fifo", 200)])
def test_a_hundred_thousand_blocks_leave_nothing_behind(
    tmp_path: Path, eviction: str, turns: int
) -> None:
    """Through a hundred slots: tables, files, open files and threads are as many as before."""
    block, buffers = memoryview(bytes(PAGE)), [memoryview(bytearray(PAGE)) for _ in range(20)]

    def there() -> tuple[int, int, list[int], int]:
        ours = [name for t in threading.enumerate() if "disk" in (name := t.name)]
        return (
            len(ours),
            sum(1 for file in Path("/proc/self/fd").iterdir() if is_below(file)),
            [(tmp_path / name).stat().st_size for name in ("blocks", "records", "lock")],
            tier._bounces.qsize(),
        )

    def is_below(file: Path) -> bool:
        """Of what others have open some may be closed meanwhile."""
        with suppress(FileNotFoundError):
            return file.readlink().is_relative_to(tmp_path)
        return False

    with closing(opened(tmp_path, 100, eviction=eviction)) as tier:
        used = []
        for turn in range(turns):
            keys = keys_of(f"{turn}", 100)
            assert tier.store(keys, [block] * 100) == [True] * 100
            assert all(tier.load(keys[:20], buffers))
            tier.remove(keys[: turn % 3])
            if turn in (turns // 10, turns - 1):
                used.append((there(), sys.getallocatedblocks()))
        (before, less), (after, more) = used
        assert after == before
        assert more < less + 2000
        assert len(tier._index) <= len(tier._nbytes) == 100
        assert tier._index.pinned_slots == tier._calls == tier._pool._jobs.qsize() == 0
        tier._index.check()


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


def test_one_directory_is_one_tiers(tmp_path: Path) -> None:
    with closing(opened(tmp_path)), pytest.raises(ValueError, match=f"process {os.getpid()} has"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "new" / "kv")):
        assert (tmp_path / "new" / "kv").stat().st_mode & 0o777 == 0o700
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "new" / "kv").iterdir()}
        assert modes == {0o600}


@pytest.mark.parametrize("at", range(RECORD))
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
        assert held(tier, keys) == [True, at >= USED, True]


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_disk_tier_whose_blocks_were_overwritten_opens_and_stores(
    tmp_path: Path, content: bytes
) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    (tmp_path / "somebody else's").write_text("kept")
    (tmp_path / "blocks").write_bytes(content)
    with closing(opened(tmp_path)) as tier:
        tier._index.check()
        assert tier.store(keys, blocks(keys))[1:] == [True] * 2
        tier.remove(keys)
        assert tier.store(keys, blocks(keys)) == [True] * 3
        assert held(tier, keys) == [True] * 3
    assert (tmp_path / "somebody else's").read_text() == "kept"


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
        assert tier.store(keys[:1], [memoryview(b"")]) == [False]  # a load could not tell it
        assert tier.store([b"", bytes(65)], blocks(keys)) == [False, False]  # keys of 1 to 64 bytes


def test_after_close_nothing_is_held_taken_or_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("a", 2)
    tier = opened(tmp_path)
    tier.store(keys, blocks(keys))
    tier.close()
    assert tier.contains(keys) == tier.store(keys, blocks(keys)) == held(tier, keys) == [False] * 2
    tier.remove(keys)
    assert not caplog.records  # no file was written to, by its number
    with closing(opened(tmp_path)) as tier:
        assert held(tier, keys) == [True] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"capacity": DiskSize(PAGE)}, f"one block takes {BESIDE + PAGE + RECORD}"),
        ({"capacity": DiskSize(1 << 60)}, "are free"),
        ({"threads": 0}, "threads is 0"),
        ({"block_nbytes": 0}, "block_nbytes is 0"),
        ({"eviction": "lfu"}, "eviction is 'lfu': no policy is called \"lfu\"; there are"),
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
