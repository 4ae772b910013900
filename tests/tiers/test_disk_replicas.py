"""Replicas of one engine on one path: each has its directory, and all together the capacity."""

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
from tests.tiers.test_disk import blocks, capacity, held
from tests.tiers.test_disk_faults import child, end, said

CAPACITY = DiskSize(4 * capacity(10))  # of four replicas with ten blocks each


def opened(path: Path, index: int, count: int, size: DiskSize = CAPACITY) -> DiskTier:
    replica = Replica(index, count)
    return DiskTier(block_nbytes=PAGE, path=str(path), capacity=size, replica=replica)


@contextmanager
def running(path: Path, count: int, *, backwards: bool = False) -> Iterator[list[DiskTier]]:
    """So many replicas, which start in order, or the last one first."""
    tiers: dict[int, DiskTier] = {}
    with ExitStack() as stack:
        for index in sorted(range(count), reverse=backwards):
            tiers[index] = stack.enter_context(closing(opened(path, index, count)))
            assert taken(path) <= CAPACITY
        yield [tiers[index] for index in range(count)]
        assert taken(path) <= CAPACITY


def taken(path: Path) -> int:
    """Bytes of disk that all files below ``path`` have, but for descriptions of namespaces."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "spaces"]
    return sum(file.stat().st_blocks * 512 for file in files)


def fill(tiers: list[DiskTier]) -> list[list[bytes]]:
    """Store other blocks in each of the replicas, as many as it holds."""
    keys = [keys_of(f"of replica {at}", tier._index.slots) for at, tier in enumerate(tiers)]
    for tier, its in zip(tiers, keys, strict=True):
        assert all(tier.store(its, blocks(its)))
    return keys


@pytest.mark.parametrize("count", [2, 3, 4])
def test_replicas_share_the_capacity_and_find_their_blocks_again(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvcache")
    with running(tmp_path, count) as tiers:
        keys = fill(tiers)
        assert len({len(its) for its in keys}) == 1
    assert f"replica 1 of {count}, with " in caplog.text
    for backwards in (True, False):
        with running(tmp_path, count, backwards=backwards) as tiers:
            for tier, its in zip(tiers, keys, strict=True):
                assert all(held(tier, its))


def test_one_replica_has_the_files_where_they_were(tmp_path: Path) -> None:
    with running(tmp_path, 1):
        assert sorted(file.name for file in tmp_path.iterdir()) == ["blocks", "lock", "records"]
    opened(tmp_path, 0, 1).close()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (2, 4), (4, 2), (4, 1), (3, 2)])
def test_another_number_of_replicas_reuses_blocks_and_never_exceeds_the_capacity(
    tmp_path: Path, before: int, after: int, backwards: bool
) -> None:
    with running(tmp_path, before) as tiers:
        keys = fill(tiers)
        for tier in tiers:
            tier.resolve(b"space", "a description, in a file of its own")
    with running(tmp_path, after, backwards=backwards) as tiers:
        room = tiers[0]._index.slots
        for tier, its in zip(tiers[: min(before, after)], keys, strict=False):
            assert sum(held(tier, its)) == min(room, len(its))
        fill(tiers)
        names = {entry.name for entry in tmp_path.iterdir() if entry.is_dir()}
        assert names == {f"replica-{index}" for index in range(1, after)}
    with running(tmp_path, before) as tiers:
        assert sum(map(len, fill(tiers))) >= 40


def test_what_is_not_a_tiers_is_not_reclaimed(tmp_path: Path) -> None:
    (tmp_path / "replica-x").mkdir()
    (tmp_path / "replica-01").mkdir()
    (tmp_path / "replica-2").write_text("a file")
    (tmp_path / "replica-3").mkdir()
    for name in ("records", "blocks"):
        (tmp_path / "replica-3" / name).write_text("foreign")
    opened(tmp_path, 0, 1).close()
    assert (tmp_path / "replica-2").read_text() == "a file"
    assert (tmp_path / "replica-3" / "blocks").read_text() == "foreign"
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} == {
        "replica-x", "replica-01", "replica-3",
    }  # fmt: skip


@pytest.mark.parametrize(
    "deleted", [["blocks"], ["blocks", "spaces"], ["blocks", "lock"], ["blocks", "spaces", "lock"]]
)
def test_former_replica_that_was_deleted_in_part_is_deleted_altogether(
    tmp_path: Path, deleted: list[str]
) -> None:
    """As when the process that deletes it is killed."""
    with running(tmp_path, 2) as tiers:
        tiers[1].resolve(b"space", "a description")
    for name in deleted:
        (tmp_path / "replica-1" / name).unlink()
    with running(tmp_path, 1):
        assert not (tmp_path / "replica-1").exists()


def test_copy_of_a_path_is_cut_down_by_the_replica_that_starts_first(tmp_path: Path) -> None:
    """A copy has no mark; before it is cut its size tells that it is a tier's."""
    with running(tmp_path, 1) as tiers:
        [keys] = fill(tiers)
    content = (tmp_path / "blocks").read_bytes()
    (tmp_path / "blocks").rename(tmp_path / "original")
    (tmp_path / "blocks").write_bytes(content)
    (tmp_path / "original").unlink()
    with running(tmp_path, 2, backwards=True) as tiers:
        assert sum(held(tiers[0], keys)) == tiers[0]._index.slots


def test_files_beside_those_of_a_former_replica_stay(tmp_path: Path) -> None:
    with running(tmp_path, 2):
        pass
    (tmp_path / "replica-1" / "notes").write_text("kept")
    with running(tmp_path, 1):
        assert [file.name for file in (tmp_path / "replica-1").iterdir()] == ["notes"]


def test_a_link_in_the_place_of_a_replica_is_not_followed(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "kv"
    with running(other, 1) as tiers:
        keys = fill(tiers)
    path.mkdir()
    (path / "replica-1").symlink_to(other)
    with running(path, 1):
        pass
    with pytest.raises(ValueError, match="where 'replica-1' is not a directory"):
        opened(path, 1, 2)
    with running(other, 1) as tiers:
        assert all(held(tiers[0], keys[0]))


@pytest.mark.parametrize(("ours", "theirs"), [((0, 1), (0, 1)), ((1, 2), (0, 1)), ((0, 1), (1, 2))])
def test_an_engine_that_runs_is_no_replica_of_another(
    tmp_path: Path, ours: tuple[int, int], theirs: tuple[int, int]
) -> None:
    with closing(opened(tmp_path, *theirs)) as tier:
        keys = keys_of("a", 9)
        assert all(tier.store(keys, blocks(keys)))
        with pytest.raises(ValueError, match=f"path is .*, which process {os.getpid()} has open"):
            opened(tmp_path, *ours)
        assert all(held(tier, keys))
    opened(tmp_path, *ours).close()


def test_a_replica_waits_while_another_one_starts(tmp_path: Path) -> None:
    tmp_path.joinpath("kv").mkdir()
    starting = os.open(tmp_path / "kv", os.O_RDONLY)
    fcntl.flock(starting, fcntl.LOCK_EX)
    opener = child(OPENER, str(tmp_path / "kv"))
    assert said(opener) == "begins"
    assert not list((tmp_path / "kv").iterdir())
    os.close(starting)
    assert said(opener) == "has it"
    end(opener)


OPENER = """
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from tests.tiers.test_disk_replicas import opened
print("begins", flush=True)
with closing(opened(Path(sys.argv[1]), 1, 2)):
    print("has it", flush=True)
"""


def test_a_replica_that_waits_too_long_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "OPENING_S", 0.0)
    starting = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(starting, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="which another engine has been opening for 0 s"):
        opened(tmp_path, 0, 2)
    os.close(starting)
    opened(tmp_path, 0, 2).close()


@pytest.mark.parametrize(
    ("replica", "size", "says"),
    [
        ((0, 40), CAPACITY, r"bytes for 40 replicas; one block takes \d+ of each"),
        ((2, 2), CAPACITY, r"replica is \(2, 2\); it takes"),
        ((0, 0), CAPACITY, r"replica is \(0, 0\); it takes"),
    ],
)
def test_replica_that_cannot_be_is_refused(
    tmp_path: Path, replica: tuple[int, int], size: DiskSize, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        opened(tmp_path, *replica, size)
    assert not list(tmp_path.iterdir())
