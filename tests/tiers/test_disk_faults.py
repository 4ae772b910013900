"""What goes wrong with disks and processes: then blocks are missing, and never other bytes."""

import errno
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache.testing import block_of, keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from kvcache.tiers.disk.record_file import Record
from tests.support.forked_children import run_in_child
from tests.tiers.test_disk import RECORD, blocks, capacity, held, opened

ROOT = Path(__file__).resolve().parents[2]
LARGE = 64 * PAGE  # long enough on its way to be cut
NAMES = keys_of("killed", 30)


def large(path: Path) -> DiskTier:
    return DiskTier(block_nbytes=LARGE, path=str(path), capacity=capacity(6, LARGE))


def child(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


WRITER = """
import sys
from pathlib import Path
from typing import Any
from tests.tiers.test_disk import blocks
from tests.tiers.test_disk_faults import LARGE, NAMES, large
made = blocks(NAMES, LARGE)
tier, turn = large(Path(sys.argv[1])), int(sys.argv[2])
while True:
    at = turn * 3 % len(NAMES)
    tier.store(NAMES[at : at + 3], made[at : at + 3])
    print(turn, flush=True)
    turn += 1
"""


def test_a_writer_that_is_killed_leaves_whole_blocks(tmp_path: Path) -> None:
    found = 0
    for life in range(8):
        writer = child(WRITER, str(tmp_path), str(life))
        for _ in range(8 + life):
            assert said(writer)
        end(writer)
        with closing(large(tmp_path)) as tier:
            tier._index.check()
            buffers = [bytearray(LARGE) for _ in NAMES]
            written = tier.load(NAMES, [memoryview(buffer) for buffer in buffers])
            for key, nbytes, buffer in zip(NAMES, written, buffers, strict=True):
                assert nbytes in (0, LARGE)
                assert not nbytes or buffer == block_of(key, LARGE)
                found += bool(nbytes)
    assert found >= 8


HOLDER = """
import os, sys
from pathlib import Path
from typing import Any
from tests.tiers.test_disk import opened
tier = opened(Path(sys.argv[1]))
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_another_process_is_named_and_its_end_is_enough(tmp_path: Path) -> None:
    holder = child(HOLDER, str(tmp_path))
    pid = said(holder)
    with pytest.raises(ValueError, match=f"{tmp_path}.* process {pid} has open"):
        opened(tmp_path)
    end(holder)
    opened(tmp_path).close()


def test_a_forked_process_does_not_keep_the_directory(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    inherited = os.dup(tier._files.lock)
    tier.close()
    opened(tmp_path).close()
    os.close(inherited)


def test_a_forked_process_that_closes_does_not_open_the_directory_to_others(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as tier:
        for close in (tier.close, tier._files.close):
            run_in_child(close)
            with pytest.raises(ValueError, match="has open"):
                opened(tmp_path)


FORKED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from tests.tiers.test_disk import opened
tier = opened(Path(sys.argv[1]))
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
from tests.tiers.test_disk import opened
tier = opened(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "600"], pass_fds=[tier._files.lock])
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_disk_tier_whose_process_ended_is_free_although_a_forked_child_runs(tmp_path: Path) -> None:
    parent = child(FORKED, str(tmp_path))
    pid = int(said(parent))
    with pytest.raises(ValueError, match=f"process {parent.pid} has open"):
        opened(tmp_path)
    end(parent)
    try:
        opened(tmp_path).close()
    finally:
        os.kill(pid, 9)


def test_disk_tier_whose_lock_was_inherited_names_the_process_that_runs(tmp_path: Path) -> None:
    parent = child(INHERITED, str(tmp_path))
    pid = int(said(parent))
    end(parent)
    try:
        with pytest.raises(ValueError, match=f"process {pid} has open"):
            opened(tmp_path)
    finally:
        os.kill(pid, 9)


LIMITED = """
import resource, sys
from contextlib import closing
from pathlib import Path
from typing import Any
from tests.tiers.test_disk import PAGE, blocks, held, keys_of, opened
old, new = keys_of("old", 4), keys_of("new", 8)
with closing(opened(Path(sys.argv[1]))) as tier:
    tier.store(old, blocks(old))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, 2 * PAGE))
    stored = tier.store(new, blocks(new))
    print(sum(stored), held(tier, new) == stored, flush=True)
try:
    opened(Path(sys.argv[1]) / "larger")
except ValueError as error:
    print(error, flush=True)
"""


def test_no_more_than_the_process_may_write(tmp_path: Path) -> None:
    writer = child(LIMITED, str(tmp_path))
    assert said(writer) == "2 True"  # the slots below the limit
    assert "which cannot be used: [Errno 27]" in said(writer)
    end(writer)


def test_a_directory_that_vanishes(tmp_path: Path) -> None:
    keys = keys_of("a", 12)
    with closing(opened(tmp_path / "kv")) as tier:
        tier.store(keys[:4], blocks(keys[:4]))
        shutil.rmtree(tmp_path / "kv")
        stored = tier.store(keys[4:], blocks(keys[4:]))
        assert held(tier, keys[4:]) == stored
        tier.remove(keys)
        assert held(tier, keys) == [False] * 12
    with closing(opened(tmp_path / "kv")) as tier:
        assert held(tier, keys) == [False] * 12


@pytest.mark.parametrize("at", range(24))
def test_disk_tier_with_a_changed_geometry_page_trusts_no_other_slot_size(
    tmp_path: Path, at: int
) -> None:
    """Bytes 0 to 7 are the magic, the last of them its version; then a slot's size; then slots."""
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    with (tmp_path / "records").open("r+b") as records:
        records.seek(at)
        byte = records.read(1)[0]
        records.seek(at)
        records.write(bytes([byte ^ 1]))
    if at < 7:
        with pytest.raises(ValueError, match="'records' was not written by kvcache"):
            opened(tmp_path)
        return
    for _ in range(2):
        with closing(opened(tmp_path)) as tier:
            assert held(tier, keys) == [at >= 16] * 3
    with closing(opened(tmp_path)) as tier:
        assert tier.store(keys, blocks(keys)) == [True] * 3
        assert held(tier, keys) == [True] * 3


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 2 * PAGE - 1, 2 * PAGE])
def test_blocks_beyond_the_end_of_their_file_are_gone_for_good(tmp_path: Path, nbytes: int) -> None:
    keys = keys_of("a", 3)
    there = [nbytes >= (at + 1) * PAGE for at in range(3)]
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    os.truncate(tmp_path / "blocks", nbytes)
    for _ in range(2):
        with closing(opened(tmp_path)) as tier:
            assert held(tier, keys) == there


def test_a_file_cut_while_it_is_open_is_a_miss(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
        os.truncate(tmp_path / "blocks", PAGE)
        assert held(tier, keys) == [True, False]


def test_a_block_that_cannot_be_read_is_forgotten_and_can_be_stored_again(tmp_path: Path) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
        os.truncate(tmp_path / "blocks", PAGE)
        assert tier.contains(keys) == [True] * 3
        assert held(tier, keys) == [True, False, False]
        assert tier.contains(keys) == [True, False, False]
        assert tier.store(keys, blocks(keys)) == [True] * 3
        assert held(tier, keys) == [True] * 3


@pytest.mark.parametrize("call", ["pwritev", "pwrite"])
def test_what_is_written_in_part_is_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    keys, real = keys_of("a", 1), os.pwrite

    def part(file: int, data: Any, at: int) -> int:
        [whole] = [data] if call == "pwrite" else data
        return real(file, whole[: len(whole) // 2], at)

    with closing(opened(tmp_path)) as tier, monkeypatch.context() as patch:
        patch.setattr(os, call, part)
        assert tier.store(keys, blocks(keys)) == [False]
        assert tier.contains(keys) == [False]
    with closing(opened(tmp_path)) as tier:
        assert tier.contains(keys) == [False]


def test_a_record_of_more_than_a_slot_holds_is_no_block(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(opened(tmp_path)) as tier:
        for slot, (key, nbytes) in enumerate(zip(keys, (PAGE, PAGE + 1), strict=True)):
            tier._records.write(Record(1, slot, nbytes, key, b""))
    with closing(opened(tmp_path)) as tier:
        assert tier.contains(keys) == [True, False]


def test_a_block_with_two_records_is_the_newer_and_leaves_with_it(tmp_path: Path) -> None:
    [key] = keys_of("a", 1)
    with closing(opened(tmp_path)) as tier:
        tier.store([key], blocks([key]))
        tier._records.write(Record(0, 5, PAGE, key, b""))  # of a slot that was free
    with closing(opened(tmp_path)) as tier:
        assert held(tier, [key]) == [True]
        tier.remove([key])
    with closing(opened(tmp_path)) as tier:
        assert tier.contains([key]) == [False]


def test_a_record_in_another_slots_place_is_no_block(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
    records = tmp_path / "records"
    data = records.read_bytes()
    one, two = data[PAGE : PAGE + RECORD], data[PAGE + RECORD : PAGE + 2 * RECORD]
    records.write_bytes(data[:PAGE] + two + one + data[PAGE + 2 * RECORD :])
    with closing(opened(tmp_path)) as tier:
        assert held(tier, keys) == [False, False]


def test_files_that_others_could_read_are_closed_to_them(tmp_path: Path) -> None:
    for name in ("lock", "records", "blocks"):
        (tmp_path / name).touch(mode=0o644)
    with closing(opened(tmp_path)):
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "kv").touch()
    with pytest.raises(ValueError, match=r"path is .*kv', which is not a directory"):
        opened(tmp_path / "kv")


@pytest.mark.parametrize("call", ["statvfs", "ftruncate", "posix_fallocate", "pread", "preadv"])
def test_what_fails_at_start_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = sorted(Path("/proc/self/fd").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ValueError, match=r"which cannot be used: .*Input/output error"):
            opened(tmp_path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    opened(tmp_path).close()


def test_a_failure_is_logged_again_after_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    keys, now = keys_of("a", 3), [0.0]
    with closing(opened(tmp_path, clock=lambda: now[0])) as tier:
        monkeypatch.setattr(os, "pwritev", fail)
        for at, logged in ((0.0, 1), (59.0, 1), (60.0, 2), (119.0, 2), (1000.0, 3)):
            now[0] = at
            assert tier.store(keys, blocks(keys)) == [False] * 3
            assert len(caplog.records) == logged
