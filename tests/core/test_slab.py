"""A slab: equal slots, shared with other processes, allocated in the background, freed at close."""

import fcntl
import os
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache import slab
from kvcache.huge_pages import HUGE_PAGE
from kvcache.slab import PAGE, Slab, SlabError, slot_nbytes_for

ATTACH = """
import sys
from kvcache.slab import Slab, SlabDescriptor
path, name, slots, nbytes = sys.argv[1:]
attached = Slab.attach(SlabDescriptor(path, name, int(slots), int(nbytes)))
attached.populate()
assert bytes(attached.view(1)[:5]) == b"hello"
attached.view(2)[:5] = b"world"
attached.close()
"""


TRUNCATE = """
import os, sys
for nbytes in (0, 1 << 20):
    for change in (
        lambda file: os.truncate(file, nbytes),
        lambda file: os.ftruncate(os.open(file, os.O_RDWR), nbytes),
    ):
        try:
            change(sys.argv[1])
        except PermissionError:
            continue
        sys.exit("it was truncated")
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("block", "slot"), [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_slot_nbytes_for_a_block_is_whole_pages(block: int, slot: int) -> None:
    assert slot_nbytes_for(block) == slot


def test_attach_in_another_process_shares_the_bytes() -> None:
    owned = Slab.create(3, PAGE)
    owned.view(1)[:5] = b"hello"
    shared = owned.descriptor
    done = run(ATTACH, shared.path, shared.name, shared.slots, shared.slot_nbytes)
    assert done.returncode == 0, done.stderr
    assert bytes(owned.view(2)[:5]) == b"world"
    assert bytes(owned.view(0)) == bytes(PAGE)
    owned.close()


def test_address_is_where_slot_0_begins() -> None:
    owned = Slab.create(3, 2 * PAGE)
    assert owned.address % PAGE == 0
    assert (owned.nbytes, owned.slots, owned.slot_nbytes) == (6 * PAGE, 3, 2 * PAGE)
    for slot in range(3):
        view = owned.view(slot)
        view[:] = bytes([slot]) * len(view)
    memory = Path("/proc/self/mem").open("rb")  # noqa: SIM115
    with memory:
        memory.seek(owned.address)
        assert memory.read(owned.nbytes) == b"".join(bytes([slot]) * 2 * PAGE for slot in range(3))
    del view
    owned.close()


@pytest.mark.parametrize("slot", [-1, 3])
def test_view_of_a_missing_slot_raises(slot: int) -> None:
    owned = Slab.create(3, PAGE)
    with pytest.raises(IndexError, match=f"slot {slot} of a slab that has 3"):
        owned.view(slot)
    owned.close()


def test_truncate_by_another_process_is_refused() -> None:
    owned = Slab.create(3, PAGE)
    owned.view(2)[:5] = b"hello"
    done = run(TRUNCATE, owned.descriptor.path)
    assert done.returncode == 0, done.stderr
    with Path(owned.descriptor.path).open("r+b") as file:
        assert os.fstat(file.fileno()).st_size == owned.nbytes
        assert bytes(owned.view(2)[:5]) == b"hello"
        with pytest.raises(PermissionError):  # the seals cannot be changed either
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    owned.close()


@pytest.mark.parametrize(("slots", "nbytes"), [(0, PAGE), (1, 0), (1, PAGE + 1)])
def test_create_with_wrong_sizes_raises(slots: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"a slab of {slots} slots of {nbytes} bytes"):
        Slab.create(slots, nbytes)


def test_create_beyond_the_memory_raises() -> None:
    with pytest.raises(SlabError, match="cannot make a slab of"):
        Slab.create(1 << 40, 1 << 22)


def test_attach_after_the_owner_closed_raises() -> None:
    owned = Slab.create(1, PAGE)
    closed = owned.descriptor
    owned.close()
    with pytest.raises(SlabError, match=f"cannot attach the slab {closed.name} at {closed.path}"):
        Slab.attach(closed)


@pytest.mark.parametrize(
    "forged",
    [
        {"slots": 3},  # larger than the file
        {"slots": 2**40},
        {"slot_nbytes": 2**62},
        {"slots": 0},
        {"slots": -2},
        {"slot_nbytes": 0},
        {"slot_nbytes": PAGE + 1},
        {"huge_nbytes": -HUGE_PAGE},
        {"huge_nbytes": PAGE},
        {"huge_nbytes": 2 * HUGE_PAGE},
        {"slots": 4096, "huge_nbytes": HUGE_PAGE},  # both files are smaller
    ],
)
def test_attach_with_sizes_of_no_slab_raises_and_leaves_no_descriptor_open(
    forged: dict[str, int],
) -> None:
    with closing(Slab.create(2, PAGE)) as owned:
        open_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        forgery = replace(owned.descriptor, huge_path=owned.descriptor.path, **forged)  # type: ignore[arg-type]
        with pytest.raises(SlabError, match="cannot attach"):
            Slab.attach(forgery)
        assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208


def test_attach_to_other_memory_raises() -> None:
    owned = Slab.create(1, PAGE)
    with pytest.raises(SlabError, match="Its owner has ended, or is on another host") as refused:
        Slab.attach(replace(owned.descriptor, name="kvcache-other"))
    assert owned.descriptor.name in str(refused.value)
    owned.close()


def test_populate_allocates_all_slots_from_the_lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "EXTENT_NBYTES", 2 * PAGE)
    owned, ready = Slab.create(7, PAGE), list[int]()
    owned.populate(ready.append)
    assert ready[0] == 2  # ``populate`` returns after the first extent
    assert owned.wait_populated() == owned.populated == 7
    assert ready == [2, 4, 6, 7]
    owned.close()


def test_populate_reports_only_whole_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "EXTENT_NBYTES", 3 * PAGE)
    owned, ready = Slab.create(4, 2 * PAGE), list[int]()
    owned.populate(ready.append)
    assert owned.wait_populated() == 4
    assert ready == [1, 3, 4]
    owned.close()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_close_and_errors_leave_no_descriptor_open() -> None:
    before = open_files()
    with pytest.raises(SlabError):
        Slab.create(1 << 40, 1 << 22)
    assert open_files() == before
    owned = Slab.create(1, PAGE)
    while_open = open_files()
    attached = Slab.attach(owned.descriptor)
    attached.close()
    with pytest.raises(SlabError):
        Slab.attach(replace(owned.descriptor, name="another"))
    assert open_files() == while_open
    owned.close()
    assert open_files() == before


def test_populate_with_slots_larger_than_an_extent_reports_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slab, "EXTENT_NBYTES", PAGE)
    owned, ready = Slab.create(3, 2 * PAGE), list[int]()
    owned.populate(ready.append)
    assert owned.wait_populated() == 3
    assert ready == [1, 2, 3]
    owned.close()


def test_populated_memory_is_resident() -> None:
    owned = Slab.create(64, PAGE)
    owned.populate()
    owned.wait_populated()
    code = Path("/proc/self/smaps").read_text()
    at = code.index(f"{owned.address:x}-")
    resident = next(line for line in code[at:].splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) * 1024 >= owned.nbytes
    owned.close()


class WaitedForSlab(Slab):
    """A slab that sets an event when ``close`` waits for the background thread."""

    waited_for = threading.Event()

    def wait_populated(self) -> int:
        self.waited_for.set()
        return super().wait_populated()


def test_close_during_populate_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "EXTENT_NBYTES", PAGE)
    before = set(threading.enumerate())  # slabs of other tests may still be populated
    owned = WaitedForSlab.create(4096, PAGE)
    ready: list[int] = []
    third = threading.Event()

    def wait_for_close(slots: int) -> None:
        ready.append(slots)
        if slots == 3:
            third.set()
            assert WaitedForSlab.waited_for.wait(60)

    owned.populate(wait_for_close)
    assert third.wait(60)
    owned.close()
    assert ready == [1, 2, 3]
    assert set(threading.enumerate()) <= before


def test_populate_without_enough_memory_logs_an_error_and_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slab, "EXTENT_NBYTES", PAGE)
    monkeypatch.setattr(Slab, "allocate", lambda self, at, nbytes: 0 if at < 2 * PAGE else 12)
    owned = Slab.create(5, PAGE)
    owned.populate()
    assert owned.wait_populated() == 2
    assert "slab: allocation stopped at" in caplog.text
    assert "Cannot allocate memory" in caplog.text
    owned.close()


def test_populate_on_an_old_kernel_allocates_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "MADV_POPULATE_WRITE", 9999)
    owned = Slab.create(16, PAGE)
    owned.populate()
    assert owned.wait_populated() == 16
    assert Path(owned.descriptor.path).stat().st_blocks * 512 == owned.nbytes
    owned.close()


def test_close_with_a_view_in_use_keeps_its_bytes() -> None:
    owned = Slab.create(1, PAGE)
    view = owned.view(0)
    view[:4] = b"kept"
    owned.close()
    owned.close()
    assert bytes(view[:4]) == b"kept"


def test_close_unmaps_and_leaves_no_file() -> None:
    before = set(Path("/dev/shm").iterdir())
    owned = Slab.create(4, PAGE)
    owned.populate()
    assert set(Path("/dev/shm").iterdir()) == before
    owned.close()
    assert owned.descriptor.name not in Path("/proc/self/maps").read_text()
    assert not any(
        owned.descriptor.name in str(fd.readlink())
        for fd in Path("/proc/self/fd").iterdir()
        if fd.is_symlink() and fd.exists()
    )
