"""DiskTier: the contract, restarts, eviction order, damaged files, options, and its bounds."""

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
from kvcache.tiers.disk.bounce_buffers import BounceBuffers
from kvcache.tiers.disk.record_file import RECORD_NBYTES
from tests.support.disk_tiers import (
    FIXED_NBYTES,
    RECORD_USED_NBYTES,
    blocks_of,
    capacity_for,
    load_hits,
    open_disk,
)


class TestDiskTier(TierTests):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DiskTier]:
        with closing(open_disk(tmp_path / "kv", self.room_blocks)) as tier:
            yield tier


class TestDiskTierWithPartialPages(TierTests):
    block_nbytes = PAGE + 77

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DiskTier]:
        size = capacity_for(self.room_blocks, 2 * PAGE)
        with closing(
            DiskTier(block_nbytes=self.block_nbytes, path=str(tmp_path), capacity=size)
        ) as tier:
            yield tier


class TestDiskTierWithoutDirectIo(TestDiskTier):
    @pytest.fixture(autouse=True, params=[errno.EINVAL, errno.EOPNOTSUPP])
    def _buffered(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        def refuse(*_: object) -> int:
            raise OSError(request.param, "no direct I/O here")

        read = os.preadv
        monkeypatch.setattr(
            os, "preadv", lambda *_: (monkeypatch.setattr(os, "preadv", read), refuse())[1]
        )


class TestDiskTierOnTmpfs(TestDiskTier):
    @pytest.fixture
    def tier(self) -> Iterator[DiskTier]:
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("/dev/shm is not writable")
        with (
            tempfile.TemporaryDirectory(dir="/dev/shm") as path,
            closing(open_disk(Path(path), self.room_blocks)) as tier,
        ):
            yield tier


def test_disk_after_restart_finds_every_block(tmp_path: Path) -> None:
    keys = keys_of("a", 6)
    with closing(open_disk(tmp_path)) as tier:
        assert tier.store(keys, blocks_of(keys)) == [True] * 6
        tier.remove(keys[2:3])
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [True, True, False, True, True, True]
        more = keys_of("b", 4)
        assert tier.store(more, blocks_of(more)) == [True] * 4
        tier.index.check()
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, more) == [True] * 4


def test_disk_store_when_full_evicts_the_tail_of_the_oldest_chain(tmp_path: Path) -> None:
    old, new = keys_of("old", 4), keys_of("new", 2)
    with closing(open_disk(tmp_path, 4)) as tier:
        tier.store(old, blocks_of(old))
        assert tier.store(new, blocks_of(new)) == [True, True]
        assert load_hits(tier, old) == [True, True, False, False]


@pytest.mark.parametrize("eviction", POLICIES)
def test_disk_after_restart_keeps_the_eviction_order(tmp_path: Path, eviction: str) -> None:
    first, second, new = keys_of("first", 3), keys_of("second", 3), keys_of("new", 6)
    with closing(open_disk(tmp_path, 6, eviction=eviction)) as tier:
        tier.store(first, blocks_of(first))
        tier.store(second, blocks_of(second))
    with closing(open_disk(tmp_path, 6, eviction=eviction)) as tier:
        evicted = []
        for key in new:
            assert tier.store([key], blocks_of([key])) == [True]
            evicted.append([old for old in first + second if not tier.contains([old])[0]])
    expected = [*reversed(first), *reversed(second)]
    assert [sorted(each) for each in evicted] == [sorted(expected[: n + 1]) for n in range(6)]


def test_disk_after_many_restarts_evicts_the_oldest_first(tmp_path: Path) -> None:
    keys = keys_of("a", 10)
    for at in range(0, 10, 2):
        with closing(open_disk(tmp_path, 4)) as tier:
            for key in keys[at : at + 2]:
                assert tier.store([key], blocks_of([key])) == [True]
            expected = keys[max(0, at - 2) : at + 2]
            assert load_hits(tier, keys) == [key in expected for key in keys]


def test_disk_load_of_a_block_makes_it_stay_longer(tmp_path: Path) -> None:
    loaded, other, new = keys_of("a", 3)
    with closing(open_disk(tmp_path, 2)) as tier:
        for key in (loaded, other):
            tier.store([key], blocks_of([key]))
        assert load_hits(tier, [loaded]) == [True]
        tier.store([new], blocks_of([new]))
        assert tier.contains([loaded, other, new]) == [True, False, True]


@pytest.mark.parametrize("eviction", POLICIES)
def test_disk_loads_in_any_order_keep_blocks_evictable(tmp_path: Path, eviction: str) -> None:
    old, new = keys_of("old", 8), keys_of("new", 8)
    with closing(open_disk(tmp_path, eviction=eviction)) as tier:
        tier.store(old, blocks_of(old))
        for order in (old, old[::3] + old[::2], old[::-1]):
            assert all(load_hits(tier, order))
        for at in range(1, 9):
            tier.store(new[:at], blocks_of(new[:at]))
            assert tier.contains(new) == [True] * at + [False] * (8 - at)
            assert tier.contains(old) == [True] * (8 - at) + [False] * at


def test_disk_chain_loaded_after_restart_loses_its_tail_first(tmp_path: Path) -> None:
    old, new = keys_of("old", 4), keys_of("new", 2)
    with closing(open_disk(tmp_path, 4)) as tier:
        tier.store(old, blocks_of(old))
    with closing(open_disk(tmp_path, 4)) as tier:
        assert all(load_hits(tier, old))
        tier.store(new, blocks_of(new))
        assert tier.contains(old) == [True, True, False, False]


def test_disk_uses_direct_io_where_supported(tmp_path: Path) -> None:
    with closing(open_disk(tmp_path)) as tier:
        try:
            os.close(os.open(tmp_path / "blocks", os.O_RDWR | os.O_DIRECT))
        except OSError:
            pytest.skip("this file system takes no direct I/O")
        assert fcntl.fcntl(tier.directory.blocks_fd, fcntl.F_GETFL) & os.O_DIRECT


def test_disk_starts_all_threads_when_opened(tmp_path: Path) -> None:
    """A process that is exiting cannot start a thread."""
    with closing(open_disk(tmp_path, threads=3)) as tier:
        assert len(tier.pool.threads) == 3


def test_disk_never_allocates_more_than_capacity(tmp_path: Path) -> None:
    for slots in (33, 200, 7, 1):
        with closing(open_disk(tmp_path, slots)) as tier:
            keys = keys_of("a", 2 * slots)
            for at in range(0, len(keys), 5):
                tier.store(keys[at : at + 5], blocks_of(keys[at : at + 5]))
            used = {file.name: file.stat().st_blocks * 512 for file in tmp_path.iterdir()}
            assert slots * PAGE <= used["blocks"]
            assert PAGE + slots * RECORD_NBYTES <= used["records"]
            assert sum(used.values()) <= capacity_for(slots)


@pytest.mark.parametrize(("eviction", "turns"), [("lru", 1000), ("fifo", 200), ("s3fifo", 200)])
def test_disk_after_100000_blocks_uses_no_more_resources(
    tmp_path: Path, eviction: str, turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With 100 slots: the same tables, files, open files and threads as before."""
    block, buffers = memoryview(bytes(PAGE)), [memoryview(bytearray(PAGE)) for _ in range(20)]

    def resources() -> tuple[int, int, list[int], int]:
        threads = [name for t in threading.enumerate() if "disk" in (name := t.name)]
        return (
            len(threads),
            sum(1 for file in Path("/proc/self/fd").iterdir() if is_below(file)),
            [(tmp_path / name).stat().st_size for name in ("blocks", "records", "lock")],
            tier.bounce_buffers.free_count,
        )

    def is_below(file: Path) -> bool:
        """Whether an open file is the tier's; it may be closed in the meantime."""
        with suppress(FileNotFoundError):
            return file.readlink().is_relative_to(tmp_path)
        return False

    with closing(open_disk(tmp_path, 100, eviction=eviction)) as tier:
        used = []
        for turn in range(turns):
            keys = keys_of(f"{turn}", 100)
            assert tier.store(keys, [block] * 100) == [True] * 100
            assert all(tier.load(keys[:20], buffers))
            tier.remove(keys[: turn % 3])
            if turn in (turns // 10, turns - 1):
                used.append((resources(), sys.getallocatedblocks()))
        (before, memory_before), (after, memory_after) = used
        assert after == before
        assert memory_after < memory_before + 2000
        assert len(tier.index) <= tier.index.slots == 100
        assert tier.index.pinned_slots == 0
        tier.index.check()
    assert not caplog.records, "close waited for a call that had ended"


def test_disk_load_and_store_of_aligned_memory_use_no_bounce_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmap

    keys = keys_of("a", 2)
    memory = memoryview(mmap.mmap(-1, 2 * PAGE))
    views = [memory[:PAGE], memory[PAGE:]]
    for key, view in zip(keys, views, strict=True):
        view[:] = block_of(key, PAGE)
    with closing(open_disk(tmp_path)) as tier:
        monkeypatch.setattr(BounceBuffers, "lend", None)
        assert tier.store(keys, views) == [True, True]
        memory[:] = bytes(2 * PAGE)
        assert tier.load(keys, views) == [PAGE, PAGE]
    assert [bytes(view) for view in views] == [block_of(key, PAGE) for key in keys]


def test_disk_opened_twice_raises_and_names_the_process(tmp_path: Path) -> None:
    with (
        closing(open_disk(tmp_path)),
        pytest.raises(ValueError, match=f"process {os.getpid()} has"),
    ):
        open_disk(tmp_path)
    open_disk(tmp_path).close()


def test_disk_creates_files_for_the_owner_alone(tmp_path: Path) -> None:
    with closing(open_disk(tmp_path / "new" / "kv")):
        assert (tmp_path / "new" / "kv").stat().st_mode & 0o777 == 0o700
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "new" / "kv").iterdir()}
        assert modes == {0o600}


@pytest.mark.parametrize("at", range(RECORD_NBYTES))
def test_disk_with_changed_record_misses_its_block(tmp_path: Path, at: int) -> None:
    keys = keys_of("a", 3)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    records = tmp_path / "records"
    data = bytearray(records.read_bytes())
    data[PAGE + RECORD_NBYTES + at] ^= 0x10
    records.write_bytes(data)
    with closing(open_disk(tmp_path)) as tier:
        tier.index.check()
        assert load_hits(tier, keys) == [True, at >= RECORD_USED_NBYTES, True]


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_disk_with_overwritten_blocks_file_opens_and_stores(tmp_path: Path, content: bytes) -> None:
    keys = keys_of("a", 3)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    (tmp_path / "other program's").write_text("kept")
    (tmp_path / "blocks").write_bytes(content)
    with closing(open_disk(tmp_path)) as tier:
        tier.index.check()
        assert tier.store(keys, blocks_of(keys))[1:] == [True] * 2
        tier.remove(keys)
        assert tier.store(keys, blocks_of(keys)) == [True] * 3
        assert load_hits(tier, keys) == [True] * 3
    assert (tmp_path / "other program's").read_text() == "kept"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ENOENT])
def test_disk_io_error_declines_or_misses_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    keys = keys_of("a", 3)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with closing(open_disk(tmp_path)) as tier:
        assert tier.store(keys[:1], blocks_of(keys[:1])) == [True]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            patch.setattr(os, "preadv", fail)
            assert tier.store(keys[1:], blocks_of(keys[1:])) == [False, False]
            assert load_hits(tier, keys) == [False] * 3
        assert len(caplog.records) == 2
        assert tier.usage().declined_blocks == {"error": 2}
        tier.index.check()
        assert tier.store(keys, blocks_of(keys)) == [True] * 3
        assert load_hits(tier, keys) == [True] * 3


def test_disk_store_of_invalid_size_or_key_declines_it(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(open_disk(tmp_path)) as tier:
        assert tier.store(keys, [memoryview(bytes(PAGE + 1)), *blocks_of(keys[1:])]) == [
            False,
            True,
        ]
        assert tier.load(keys[1:], [memoryview(bytearray(PAGE - 1))]) == [0]
        assert tier.store(keys[:1], [memoryview(b"")]) == [False]  # a load would look like a miss
        assert tier.store([b"", bytes(81)], blocks_of(keys)) == [
            False,
            False,
        ]  # keys of 1 to 80 bytes


def test_disk_after_close_misses_declines_and_writes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("a", 2)
    tier = open_disk(tmp_path)
    tier.store(keys, blocks_of(keys))
    tier.close()
    assert (
        tier.contains(keys)
        == tier.store(keys, blocks_of(keys))
        == load_hits(tier, keys)
        == [False] * 2
    )
    tier.remove(keys)
    assert not caplog.records  # no closed descriptor was written to
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [True] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": DiskSize(PAGE)}, f"one block takes {FIXED_NBYTES + PAGE + RECORD_NBYTES}"),
        ({"capacity": DiskSize(1 << 60)}, "are free"),
        ({"threads": 0}, "threads is 0"),
        ({"block_nbytes": 0}, "block_nbytes is 0"),
        ({"eviction": "lfu"}, "eviction is 'lfu': no policy is called \"lfu\"; there are"),
        ({"path": "/dev/null/kv"}, "which cannot be used"),
        ({"path": "/proc/kv"}, "which cannot be used"),
    ],
)
def test_disk_with_invalid_option_raises_value_error(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    defaults = {"block_nbytes": PAGE, "path": str(tmp_path), "capacity": capacity_for(4)}
    arguments: dict[str, Any] = defaults | options
    with pytest.raises(ValueError, match=message):
        DiskTier(**arguments)
    open_disk(tmp_path).close()  # nothing stayed locked


def test_disk_under_concurrent_calls_stays_consistent(tmp_path: Path) -> None:
    chains = [keys_of(f"chain {at}", 4) for at in range(12)]
    with closing(open_disk(tmp_path, 40)) as tier:

        def load_and_store(seed: int) -> int:
            hits = 0
            for turn in range(60):
                keys = chains[(seed * 7 + turn * 5) % len(chains)]
                hits += sum(load_hits(tier, keys))
                tier.store(keys, blocks_of(keys))
                hits += sum(load_hits(tier, keys))  # the other threads cannot have evicted all
                if turn % 9 == seed:
                    tier.remove(keys[2:])
            return hits

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(load_and_store, range(6))) > 0
        tier.index.check()
        assert tier.index.pinned_slots == 0
