"""DiskTier with replicas: each has a directory, and all of them share the capacity."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from kvcache.replica import Replica
from kvcache.sizes import DiskSize
from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier, replicas
from tests.support.child_programs import kill, read_line, start
from tests.support.disk_tiers import blocks_of, capacity_for, load_hits, require_attributes

CAPACITY = DiskSize(4 * capacity_for(10))  # for four replicas with ten blocks each


def open_replica(path: Path, index: int, count: int, size: DiskSize = CAPACITY) -> DiskTier:
    replica = Replica(index, count)
    return DiskTier(block_nbytes=PAGE, path=str(path), capacity=size, replica=replica)


@contextmanager
def running(path: Path, count: int, *, backwards: bool = False) -> Iterator[list[DiskTier]]:
    """Open `count` replicas, in order or the last one first."""
    tiers: dict[int, DiskTier] = {}
    with ExitStack() as stack:
        for index in sorted(range(count), reverse=backwards):
            tiers[index] = stack.enter_context(closing(open_replica(path, index, count)))
            assert allocated_nbytes(path) <= CAPACITY
        yield [tiers[index] for index in range(count)]
        assert allocated_nbytes(path) <= CAPACITY


def allocated_nbytes(path: Path) -> int:
    """Return the allocated bytes of all files below `path`, except descriptions of namespaces."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "spaces"]
    return sum(file.stat().st_blocks * 512 for file in files)


def fill(tiers: list[DiskTier]) -> list[list[bytes]]:
    """Fill each replica with different blocks; return their keys."""
    keys = [keys_of(f"replica {at}", tier.index.slots) for at, tier in enumerate(tiers)]
    for tier, own in zip(tiers, keys, strict=True):
        assert all(tier.store(own, blocks_of(own)))
    return keys


@pytest.mark.parametrize("count", [2, 3, 4])
def test_disk_replicas_share_the_capacity_and_find_their_blocks_after_restart(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvcache")
    with running(tmp_path, count) as tiers:
        keys = fill(tiers)
        assert len({len(own) for own in keys}) == 1
    assert f"replica 1 of {count}, with " in caplog.text
    for backwards in (True, False):
        with running(tmp_path, count, backwards=backwards) as tiers:
            for tier, own in zip(tiers, keys, strict=True):
                assert all(load_hits(tier, own))


def test_disk_single_replica_uses_the_path_itself(tmp_path: Path) -> None:
    with running(tmp_path, 1):
        assert sorted(file.name for file in tmp_path.iterdir()) == ["blocks", "lock", "records"]
    open_replica(tmp_path, 0, 1).close()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (2, 4), (4, 2), (4, 1), (3, 2)])
def test_disk_with_another_number_of_replicas_reuses_blocks_within_the_capacity(
    tmp_path: Path, before: int, after: int, backwards: bool
) -> None:
    with running(tmp_path, before) as tiers:
        keys = fill(tiers)
        for tier in tiers:
            tier.resolve(b"space", "a description, in another file")
    with running(tmp_path, after, backwards=backwards) as tiers:
        slots = tiers[0].index.slots
        for tier, own in zip(tiers[: min(before, after)], keys, strict=False):
            assert sum(load_hits(tier, own)) == min(slots, len(own))
        fill(tiers)
        names = {entry.name for entry in tmp_path.iterdir() if entry.is_dir()}
        assert names == {f"replica-{index}" for index in range(1, after)}
    with running(tmp_path, before) as tiers:
        assert sum(map(len, fill(tiers))) >= 40


def test_disk_replica_does_not_reclaim_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "replica-x").mkdir()
    (tmp_path / "replica-01").mkdir()
    (tmp_path / "replica-2").write_text("a file")
    (tmp_path / "replica-3").mkdir()
    for name in ("records", "blocks"):
        (tmp_path / "replica-3" / name).write_text("foreign")
    open_replica(tmp_path, 0, 1).close()
    assert (tmp_path / "replica-2").read_text() == "a file"
    assert (tmp_path / "replica-3" / "blocks").read_text() == "foreign"
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} == {
        "replica-x", "replica-01", "replica-3",
    }  # fmt: skip


@pytest.mark.parametrize(
    "deleted", [["blocks"], ["blocks", "spaces"], ["blocks", "lock"], ["blocks", "spaces", "lock"]]
)
def test_disk_replica_deletes_the_rest_of_a_half_deleted_replica(
    tmp_path: Path, deleted: list[str]
) -> None:
    """A process that is killed while it deletes leaves such files."""
    with running(tmp_path, 2) as tiers:
        tiers[1].resolve(b"space", "a description")
    for name in deleted:
        (tmp_path / "replica-1" / name).unlink()
    with running(tmp_path, 1):
        assert not (tmp_path / "replica-1").exists()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("is_deleted", [False, True])
def test_disk_replica_reclaims_a_replica_without_records(
    tmp_path: Path, count: int, is_deleted: bool
) -> None:
    """One that no longer runs, or that has not started again yet and may be too large."""
    require_attributes(tmp_path)
    with running(tmp_path, 2) as tiers:
        fill(tiers)
    records = tmp_path / "replica-1" / "records"
    if is_deleted:
        records.unlink()
    else:
        os.truncate(records, 0)
    with closing(open_replica(tmp_path, 0, count)):
        assert records.parent.exists() == (count > 1)
        share = CAPACITY // count if count > 1 else 0
        assert allocated_nbytes(records.parent) <= share


def test_disk_replica_cuts_a_copied_path_to_its_share(tmp_path: Path) -> None:
    """A copy has no mark; its size identifies it, until it is cut."""
    with running(tmp_path, 1) as tiers:
        [keys] = fill(tiers)
    content = (tmp_path / "blocks").read_bytes()
    (tmp_path / "blocks").rename(tmp_path / "original")
    (tmp_path / "blocks").write_bytes(content)
    (tmp_path / "original").unlink()
    with running(tmp_path, 2, backwards=True) as tiers:
        assert sum(load_hits(tiers[0], keys)) == tiers[0].index.slots


def test_disk_replica_keeps_other_files_in_a_former_replica(tmp_path: Path) -> None:
    with running(tmp_path, 2):
        pass
    (tmp_path / "replica-1" / "notes").write_text("kept")
    with running(tmp_path, 1):
        assert [file.name for file in (tmp_path / "replica-1").iterdir()] == ["notes"]


def test_disk_replica_does_not_follow_a_link_to_a_directory(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "kv"
    with running(other, 1) as tiers:
        keys = fill(tiers)
    path.mkdir()
    (path / "replica-1").symlink_to(other)
    with running(path, 1):
        pass
    with pytest.raises(ValueError, match="where 'replica-1' is not a directory"):
        open_replica(path, 1, 2)
    with running(other, 1) as tiers:
        assert all(load_hits(tiers[0], keys[0]))


@pytest.mark.parametrize(("own", "other"), [((0, 1), (0, 1)), ((1, 2), (0, 1)), ((0, 1), (1, 2))])
def test_disk_replica_of_another_running_engine_raises_value_error(
    tmp_path: Path, own: tuple[int, int], other: tuple[int, int]
) -> None:
    with closing(open_replica(tmp_path, *other)) as tier:
        keys = keys_of("a", 9)
        assert all(tier.store(keys, blocks_of(keys)))
        with pytest.raises(ValueError, match=f"path is .*, which process {os.getpid()} has open"):
            open_replica(tmp_path, *own)
        assert all(load_hits(tier, keys))
    open_replica(tmp_path, *own).close()


def test_disk_replica_waits_while_another_one_starts(tmp_path: Path) -> None:
    tmp_path.joinpath("kv").mkdir()
    starting = os.open(tmp_path / "kv", os.O_RDONLY)
    fcntl.flock(starting, fcntl.LOCK_EX)
    opener = start(OPENER, str(tmp_path / "kv"))
    assert read_line(opener) == "starts"
    assert not list((tmp_path / "kv").iterdir())
    os.close(starting)
    assert read_line(opener) == "open"
    kill(opener)


OPENER = """
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from tests.tiers.test_disk_replicas import open_replica
print("starts", flush=True)
with closing(open_replica(Path(sys.argv[1]), 1, 2)):
    print("open", flush=True)
"""


def test_disk_replica_that_waits_too_long_raises_value_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "STARTUP_TIMEOUT_S", 0.0)
    starting = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(starting, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="which another engine has been opening for 0 s"):
        open_replica(tmp_path, 0, 2)
    os.close(starting)
    open_replica(tmp_path, 0, 2).close()


@pytest.mark.parametrize(
    ("replica", "size", "message"),
    [
        ((0, 40), CAPACITY, r"bytes for 40 replicas; one block takes \d+ of each"),
        ((2, 2), CAPACITY, r"replica is \(2, 2\); it takes"),
        ((0, 0), CAPACITY, r"replica is \(0, 0\); it takes"),
    ],
)
def test_disk_with_invalid_replica_raises_value_error(
    tmp_path: Path, replica: tuple[int, int], size: DiskSize, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_replica(tmp_path, *replica, size)
    assert not list(tmp_path.iterdir())
