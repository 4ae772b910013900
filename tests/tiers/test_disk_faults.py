"""DiskTier when processes are killed and files are damaged: blocks are missed, never wrong."""

import errno
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache.testing import block_of, keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from kvcache.tiers.disk.record_file import RECORD_NBYTES, Record
from tests.support.child_programs import kill, read_line, start
from tests.support.disk_tiers import blocks_of, capacity_for, load_hits, open_disk
from tests.support.forked_children import run_in_child

LARGE_NBYTES = 64 * PAGE  # large enough that a kill interrupts writes
KILLED_KEYS = keys_of("killed", 30)


def open_with_large_blocks(path: Path) -> DiskTier:
    return DiskTier(
        block_nbytes=LARGE_NBYTES, path=str(path), capacity=capacity_for(6, LARGE_NBYTES)
    )


WRITER = """
import sys
from pathlib import Path
from typing import Any
from tests.support.disk_tiers import blocks_of
from tests.tiers.test_disk_faults import KILLED_KEYS, LARGE_NBYTES, open_with_large_blocks
blocks = blocks_of(KILLED_KEYS, LARGE_NBYTES)
tier, turn = open_with_large_blocks(Path(sys.argv[1])), int(sys.argv[2])
while True:
    at = turn * 3 % len(KILLED_KEYS)
    tier.store(KILLED_KEYS[at : at + 3], blocks[at : at + 3])
    print(turn, flush=True)
    turn += 1
"""


def test_disk_after_kill_while_writing_has_whole_blocks(tmp_path: Path) -> None:
    hits = 0
    for life in range(8):
        writer = start(WRITER, str(tmp_path), str(life))
        for _ in range(8 + life):
            assert read_line(writer)
        kill(writer)
        with closing(open_with_large_blocks(tmp_path)) as tier:
            tier.index.check()
            buffers = [bytearray(LARGE_NBYTES) for _ in KILLED_KEYS]
            written = tier.load(KILLED_KEYS, [memoryview(buffer) for buffer in buffers])
            for key, nbytes, buffer in zip(KILLED_KEYS, written, buffers, strict=True):
                assert nbytes in (0, LARGE_NBYTES)
                assert not nbytes or buffer == block_of(key, LARGE_NBYTES)
                hits += bool(nbytes)
    assert hits >= 8


OWNER = """
import os, sys
from pathlib import Path
from typing import Any
from tests.support.disk_tiers import open_disk
tier = open_disk(Path(sys.argv[1]))
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_disk_open_in_another_process_raises_until_that_process_ends(tmp_path: Path) -> None:
    owner = start(OWNER, str(tmp_path))
    pid = read_line(owner)
    with pytest.raises(ValueError, match=f"{tmp_path}.* process {pid} has open"):
        open_disk(tmp_path)
    kill(owner)
    open_disk(tmp_path).close()


def test_disk_closed_with_inherited_lock_descriptor_can_be_opened(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    inherited = os.dup(tier.directory.lock_fd)
    tier.close()
    open_disk(tmp_path).close()
    os.close(inherited)


def test_disk_closed_in_forked_child_stays_locked_by_the_parent(tmp_path: Path) -> None:
    with closing(open_disk(tmp_path)) as tier:
        for close in (tier.close, tier.directory.close):
            run_in_child(close)
            with pytest.raises(ValueError, match="has open"):
                open_disk(tmp_path)


FORKED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from tests.support.disk_tiers import open_disk
tier = open_disk(Path(sys.argv[1]))
if not os.fork():
    tier.close()
    print(os.getpid(), flush=True)
    signal.pause()
sys.stdin.read()
"""

INHERITED = """
import os, subprocess, sys
from pathlib import Path
from typing import Any
from tests.support.disk_tiers import open_disk
tier = open_disk(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "600"], pass_fds=[tier.directory.lock_fd])
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_disk_after_end_of_process_with_running_forked_child_can_be_opened(tmp_path: Path) -> None:
    parent = start(FORKED, str(tmp_path))
    pid = int(read_line(parent))
    with pytest.raises(ValueError, match=f"process {parent.pid} has open"):
        open_disk(tmp_path)
    kill(parent)
    try:
        open_disk(tmp_path).close()
    finally:
        os.kill(pid, 9)


def test_disk_lock_inherited_by_a_running_process_names_it(tmp_path: Path) -> None:
    parent = start(INHERITED, str(tmp_path))
    pid = int(read_line(parent))
    kill(parent)
    try:
        with pytest.raises(ValueError, match=f"process {pid} has open"):
            open_disk(tmp_path)
    finally:
        os.kill(pid, 9)


LIMITED = """
import resource, sys
from contextlib import closing
from pathlib import Path
from typing import Any
from kvcache.testing import keys_of
from tests.support.disk_tiers import PAGE, blocks_of, load_hits, open_disk
old, new = keys_of("old", 4), keys_of("new", 8)
with closing(open_disk(Path(sys.argv[1]))) as tier:
    tier.store(old, blocks_of(old))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, 2 * PAGE))
    stored = tier.store(new, blocks_of(new))
    print(sum(stored), load_hits(tier, new) == stored, flush=True)
try:
    open_disk(Path(sys.argv[1]) / "larger")
except ValueError as error:
    print(error, flush=True)
"""


def test_disk_above_the_file_size_limit_declines_blocks(tmp_path: Path) -> None:
    writer = start(LIMITED, str(tmp_path))
    assert read_line(writer) == "2 True"  # the slots below the limit
    assert "which cannot be used: [Errno 27]" in read_line(writer)
    kill(writer)


def test_disk_with_deleted_directory_misses_and_can_be_opened_again(tmp_path: Path) -> None:
    keys = keys_of("a", 12)
    with closing(open_disk(tmp_path / "kv")) as tier:
        tier.store(keys[:4], blocks_of(keys[:4]))
        shutil.rmtree(tmp_path / "kv")
        stored = tier.store(keys[4:], blocks_of(keys[4:]))
        assert load_hits(tier, keys[4:]) == stored
        tier.remove(keys)
        assert load_hits(tier, keys) == [False] * 12
    with closing(open_disk(tmp_path / "kv")) as tier:
        assert load_hits(tier, keys) == [False] * 12


@pytest.mark.parametrize("at", range(24))
def test_disk_with_changed_geometry_page_finds_blocks_of_equal_slot_size_only(
    tmp_path: Path, at: int
) -> None:
    """Bytes 0 to 7 are the magic, byte 7 the version; then the bytes of a slot; then the slots."""
    keys = keys_of("a", 3)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    with (tmp_path / "records").open("r+b") as records:
        records.seek(at)
        byte = records.read(1)[0]
        records.seek(at)
        records.write(bytes([byte ^ 1]))
    if at < 7:
        with pytest.raises(ValueError, match="'records' was not written by kvcache"):
            open_disk(tmp_path)
        return
    for _ in range(2):
        with closing(open_disk(tmp_path)) as tier:
            assert load_hits(tier, keys) == [at >= 16] * 3
    with closing(open_disk(tmp_path)) as tier:
        assert tier.store(keys, blocks_of(keys)) == [True] * 3
        assert load_hits(tier, keys) == [True] * 3


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 2 * PAGE - 1, 2 * PAGE])
def test_disk_with_cut_blocks_file_misses_blocks_beyond_end(tmp_path: Path, nbytes: int) -> None:
    keys = keys_of("a", 3)
    expected = [nbytes >= (at + 1) * PAGE for at in range(3)]
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    os.truncate(tmp_path / "blocks", nbytes)
    for _ in range(2):
        with closing(open_disk(tmp_path)) as tier:
            assert load_hits(tier, keys) == expected


def test_disk_with_blocks_file_cut_while_open_misses(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
        os.truncate(tmp_path / "blocks", PAGE)
        assert load_hits(tier, keys) == [True, False]


def test_disk_load_of_unreadable_block_removes_it_so_it_can_be_stored(tmp_path: Path) -> None:
    keys = keys_of("a", 3)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
        os.truncate(tmp_path / "blocks", PAGE)
        assert tier.contains(keys) == [True] * 3
        assert load_hits(tier, keys) == [True, False, False]
        assert tier.contains(keys) == [True, False, False]
        assert tier.store(keys, blocks_of(keys)) == [True] * 3
        assert load_hits(tier, keys) == [True] * 3


@pytest.mark.parametrize("call", ["pwritev", "pwrite"])
def test_disk_partial_write_declines_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    keys, real = keys_of("a", 1), os.pwrite

    def write_half(file: int, data: Any, at: int) -> int:
        [whole] = [data] if call == "pwrite" else data
        return real(file, whole[: len(whole) // 2], at)

    with closing(open_disk(tmp_path)) as tier, monkeypatch.context() as patch:
        patch.setattr(os, call, write_half)
        assert tier.store(keys, blocks_of(keys)) == [False]
        assert tier.contains(keys) == [False]
    with closing(open_disk(tmp_path)) as tier:
        assert tier.contains(keys) == [False]


def test_disk_record_with_more_bytes_than_a_slot_is_ignored(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(open_disk(tmp_path)) as tier:
        for slot, (key, nbytes) in enumerate(zip(keys, (PAGE, PAGE + 1), strict=True)):
            tier.records.write(Record(1, slot, nbytes, key, b""))
    with closing(open_disk(tmp_path)) as tier:
        assert tier.contains(keys) == [True, False]


def test_disk_with_two_records_of_one_key_uses_newer_and_clears_older(
    tmp_path: Path,
) -> None:
    [key] = keys_of("a", 1)
    with closing(open_disk(tmp_path)) as tier:
        tier.store([key], blocks_of([key]))
        tier.records.write(Record(0, 5, PAGE, key, b""))  # in a free slot
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, [key]) == [True]
        tier.remove([key])
    with closing(open_disk(tmp_path)) as tier:
        assert tier.contains([key]) == [False]


def test_disk_record_in_the_place_of_another_slot_is_ignored(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    records = tmp_path / "records"
    data = records.read_bytes()
    first, second = (
        data[PAGE : PAGE + RECORD_NBYTES],
        data[PAGE + RECORD_NBYTES : PAGE + 2 * RECORD_NBYTES],
    )
    records.write_bytes(data[:PAGE] + second + first + data[PAGE + 2 * RECORD_NBYTES :])
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [False, False]


def test_disk_opening_files_readable_by_others_restricts_them(tmp_path: Path) -> None:
    for name in ("lock", "records", "blocks"):
        (tmp_path / name).touch(mode=0o644)
    with closing(open_disk(tmp_path)):
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_disk_with_path_of_a_file_raises_value_error(tmp_path: Path) -> None:
    (tmp_path / "kv").touch()
    with pytest.raises(ValueError, match=r"path is .*kv', which is not a directory"):
        open_disk(tmp_path / "kv")


@pytest.mark.parametrize("call", ["statvfs", "ftruncate", "posix_fallocate", "pread", "preadv"])
def test_disk_failed_open_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = sorted(Path("/proc/self/fd").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ValueError, match=r"which cannot be used: .*Input/output error"):
            open_disk(tmp_path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    open_disk(tmp_path).close()


def test_disk_logs_the_same_error_again_after_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    keys, now = keys_of("a", 3), [0.0]
    with closing(open_disk(tmp_path, clock=lambda: now[0])) as tier:
        monkeypatch.setattr(os, "pwritev", fail)
        for at, logged in ((0.0, 1), (59.0, 1), (60.0, 2), (119.0, 2), (1000.0, 3)):
            now[0] = at
            assert tier.store(keys, blocks_of(keys)) == [False] * 3
            assert len(caplog.records) == logged
