"""What a disk tier owes when things go wrong between its steps."""

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from kvcache.sizes import DiskSize
from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from tests.tiers.test_disk import RECORD, blocks, capacity, held, opened


@pytest.mark.parametrize("pages", [0, 1, 2])
def test_a_block_beyond_the_end_of_its_file_is_gone(tmp_path: Path, pages: int) -> None:
    keys = keys_of("a", 3)
    with closing(opened(tmp_path)) as tier:
        assert tier.store(keys, blocks(keys)) == [True] * 3
    os.truncate(tmp_path / "blocks", pages * PAGE)
    with closing(opened(tmp_path)) as tier:
        assert tier.contains(keys) == [at < pages for at in range(3)]
        assert held(tier, keys) == [at < pages for at in range(3)]
    with closing(opened(tmp_path)) as tier:  # nor does a later start bring it back
        assert held(tier, keys) == [at < pages for at in range(3)]


def test_a_slot_is_not_given_away_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block of a call breaks; the second is still on its way to the disk."""
    a, b = keys_of("a", 2)
    real, go, late = os.pwritev, threading.Event(), []

    def slow(*of: Any) -> int:
        assert go.wait(10)
        late.append(tier._index.pinned_slots)
        return real(*of)

    with closing(opened(tmp_path, 2)) as tier:
        gone = memoryview(bytearray(PAGE))[::-1]  # not contiguous: cannot be written
        monkeypatch.setattr(os, "pwritev", slow)
        threading.Timer(0.3, go.set).start()
        with suppress(Exception):
            tier.store([a, b], [gone, *blocks([b])])
        pinned = tier._index.pinned_slots
        flying = not late
        go.set()
        assert not (flying and not pinned), "a write is in flight to a slot that is free"


def test_remove_never_writes_after_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() comes between remove's look at the index and its write of the record."""
    keys = keys_of("a", 3)
    tier = opened(tmp_path / "kv")
    tier.store(keys, blocks(keys))
    victim = tmp_path / "somebody else's"
    victim.write_bytes(b"x" * 65536)
    fds: list[int] = []
    real = tier._record

    def between(slot: int, record: bytes) -> None:
        number = tier._records
        closer = threading.Thread(target=tier.close)
        closer.start()
        closer.join(0.5)
        # a file that is opened next gets the number that was given back
        while not fds or fds[-1] < number:
            fds.append(os.open(victim, os.O_RDWR))
        real(slot, record)

    monkeypatch.setattr(tier, "_record", between)
    tier.remove(keys[:1])
    tier.close()
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
    assert victim.read_bytes() == b"x" * 65536


@pytest.mark.parametrize("verb", ["load", "store"])
def test_a_pool_that_takes_nothing_is_a_decline(tmp_path: Path, verb: str) -> None:
    """No more threads, or closed by another thread meanwhile."""
    keys = keys_of("a", 2)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
        tier._pool.shutdown()
        if verb == "load":
            assert held(tier, keys) == [False, False]
        else:
            new = keys_of("b", 2)
            assert tier.store(new, blocks(new)) == [False, False]
        assert tier._index.pinned_slots == 0


@pytest.mark.parametrize(
    ("options", "patch"),
    [
        ({"eviction": "nonsense"}, None),
        ({"block_nbytes": 0}, None),
        ({}, "ftruncate"),
        ({}, "posix_fallocate"),
    ],
)
def test_what_cannot_be_opened_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], patch: str | None
) -> None:
    usual: dict[str, Any] = {
        "block_nbytes": PAGE, "path": str(tmp_path), "capacity": capacity(4)
    }  # fmt: skip

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with monkeypatch.context() as only:
        if patch:
            only.setattr(os, patch, full)
        with pytest.raises(ValueError):  # noqa: PT011
            DiskTier(**(usual | options))
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
    opened(tmp_path, 4).close()


def test_the_space_of_the_records_is_taken_too(tmp_path: Path) -> None:
    with closing(opened(tmp_path, 1000)):
        files = {file.name: file.stat().st_blocks * 512 for file in tmp_path.iterdir()}
    assert files["records"] >= PAGE + 1000 * RECORD
    assert files["records"] + files["blocks"] <= DiskSize(capacity(1000) + 2 * PAGE)


def test_close_waits_for_who_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, seen = keys_of("a", 4), threading.Barrier(2, timeout=10)
    tier = opened(tmp_path)
    tier.store(keys, blocks(keys))
    real = os.preadv

    def slow(*of: Any) -> int:
        seen.wait()
        closer.join(0.2)
        assert closer.is_alive()
        return real(*of)

    monkeypatch.setattr(os, "preadv", slow)
    found: list[list[bool]] = []
    closer = threading.Thread(target=tier.close)
    reader = threading.Thread(target=lambda: found.append(held(tier, keys[:1])))
    reader.start()
    closer.start()
    seen.wait()
    reader.join()
    closer.join()
    assert found == [[True]]
    assert tier.contains(keys) == [False] * 4


def test_a_record_is_cleared_before_and_written_after_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = keys_of("old", 1), keys_of("new", 1)
    steps: list[str] = []
    write, record = os.pwritev, DiskTier._record

    def payload(*of: Any) -> int:
        steps.append("block")
        return write(*of)

    def noted(tier: DiskTier, slot: int, data: bytes) -> None:
        steps.append("record" if any(data) else "clear")
        record(tier, slot, data)

    with closing(opened(tmp_path, 1)) as tier:
        tier.store(old, blocks(old))
        monkeypatch.setattr(os, "pwritev", payload)
        monkeypatch.setattr(DiskTier, "_record", noted)
        assert tier.store(new, blocks(new)) == [True]
    assert steps == ["clear", "block", "record"]


@pytest.mark.parametrize("restarts", [1, 2])
def test_the_oldest_goes_first_after_restarts(tmp_path: Path, restarts: int) -> None:
    first = keys_of("first", 4)
    with closing(opened(tmp_path, 4)) as tier:
        for key in first:
            tier.store([key], blocks([key]))
        tier.remove(first[:1])
    left = first[1:]
    for turn in range(restarts):
        with closing(opened(tmp_path, 4)) as tier:
            for key in keys_of(f"{turn}", 2):
                assert tier.store([key], blocks([key])) == [True]
                left.append(key)
            gone = len(left) - 4
            assert tier.contains(left) == [False] * gone + [True] * 4
            left = left[gone:]


def test_space_is_taken_at_once_and_used_directly(tmp_path: Path) -> None:
    with closing(opened(tmp_path, 100)) as tier:
        assert (tmp_path / "blocks").stat().st_blocks * 512 >= 100 * PAGE
        try:
            os.close(os.open(tmp_path / "blocks", os.O_RDWR | os.O_DIRECT))
        except OSError:
            pytest.skip("this file system takes no direct I/O")
        assert fcntl.fcntl(tier._blocks, fcntl.F_GETFL) & os.O_DIRECT


def test_what_is_being_read_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = keys_of("old", 1), keys_of("new", 1)
    real, answers = os.preadv, []
    with closing(opened(tmp_path, 1)) as tier:
        tier.store(old, blocks(old))

        def read(*of: Any) -> int:
            answers.append(writer.submit(tier.store, new, blocks(new)).result(10))
            return real(*of)

        monkeypatch.setattr(os, "preadv", read)
        with ThreadPoolExecutor(1) as writer:
            assert held(tier, old) == [True]
        assert answers == [[False]]


def test_a_short_read_is_a_miss(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    with closing(opened(tmp_path, 2)) as tier:
        tier.store(keys, blocks(keys))
        os.truncate(tmp_path / "blocks", PAGE)
        assert held(tier, keys) == [True, False]


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
