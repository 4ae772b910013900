"""Memory in equal slots, here and in another process, made in the background, gone at the end."""

import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache import slab
from kvcache.slab import PAGE, Slab, SlabError, slot_nbytes_for

ATTACH = """
import sys
from kvcache.slab import Slab, SlabDescriptor
path, name, slots, nbytes = sys.argv[1:]
theirs = Slab.attach(SlabDescriptor(path, name, int(slots), int(nbytes)))
theirs.populate()
assert bytes(theirs.view(1)[:5]) == b"hello"
theirs.view(2)[:5] = b"world"
theirs.close()
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
def test_a_slot_is_whole_pages(block: int, slot: int) -> None:
    assert slot_nbytes_for(block) == slot


def test_another_process_sees_the_same_bytes() -> None:
    ours = Slab.create(3, PAGE)
    ours.view(1)[:5] = b"hello"
    told = ours.descriptor
    done = run(ATTACH, told.path, told.name, told.slots, told.slot_nbytes)
    assert done.returncode == 0, done.stderr
    assert bytes(ours.view(2)[:5]) == b"world"
    assert bytes(ours.view(0)) == bytes(PAGE)
    ours.close()


def test_slots_are_where_the_address_says() -> None:
    ours = Slab.create(3, 2 * PAGE)
    assert ours.address % PAGE == 0
    assert (ours.nbytes, ours.slots, ours.slot_nbytes) == (6 * PAGE, 3, 2 * PAGE)
    for slot in range(3):
        view = ours.view(slot)
        view[:] = bytes([slot]) * len(view)
    memory = Path("/proc/self/mem").open("rb")  # noqa: SIM115
    with memory:
        memory.seek(ours.address)
        assert memory.read(ours.nbytes) == b"".join(bytes([slot]) * 2 * PAGE for slot in range(3))
    del view
    ours.close()


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_does_not_exist(slot: int) -> None:
    ours = Slab.create(3, PAGE)
    with pytest.raises(IndexError, match=f"slot {slot} of a slab that has 3"):
        ours.view(slot)
    ours.close()


def test_slab_that_another_process_truncates_keeps_size_and_bytes() -> None:
    ours = Slab.create(3, PAGE)
    ours.view(2)[:5] = b"hello"
    done = run(TRUNCATE, ours.descriptor.path)
    assert done.returncode == 0, done.stderr
    assert ours._fd is not None
    assert os.fstat(ours._fd).st_size == ours.nbytes
    assert bytes(ours.view(2)[:5]) == b"hello"
    with pytest.raises(PermissionError):  # nor can a seal be taken off, or another one be added
        fcntl.fcntl(ours._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    ours.close()


def test_slab_on_a_kernel_that_seals_no_huge_pages_takes_small_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, refused = os.memfd_create, []

    def memfd_create(name: str, flags: int) -> int:
        if flags & os.MFD_HUGETLB and flags & os.MFD_ALLOW_SEALING:
            refused.append(name)
            raise OSError(errno.EINVAL, "Invalid argument")
        return make(name, flags)

    (tmp_path / "free").write_text("1000\n")
    monkeypatch.setattr(slab, "_FREE_HUGE_PAGES", tmp_path / "free")
    monkeypatch.setattr(os, "memfd_create", memfd_create)
    ours = Slab.create(3, PAGE)
    assert refused
    ours.view(2)[:5] = b"hello"
    assert run(TRUNCATE, ours.descriptor.path).returncode == 0
    ours.close()


@pytest.mark.parametrize(("slots", "nbytes"), [(0, PAGE), (1, 0), (1, PAGE + 1)])
def test_sizes_that_make_no_slab(slots: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"a slab of {slots} slots of {nbytes} bytes"):
        Slab.create(slots, nbytes)


def test_memory_that_the_kernel_refuses() -> None:
    with pytest.raises(SlabError, match="cannot make a slab of"):
        Slab.create(1 << 40, 1 << 22)


def test_a_descriptor_that_leads_nowhere() -> None:
    ours = Slab.create(1, PAGE)
    told = ours.descriptor
    ours.close()
    with pytest.raises(SlabError, match=f"cannot attach the slab {told.name} at {told.path}"):
        Slab.attach(told)


def test_a_descriptor_that_leads_to_other_memory() -> None:
    ours = Slab.create(1, PAGE)
    with pytest.raises(SlabError, match="Its owner has ended, or is on another host") as refused:
        Slab.attach(replace(ours.descriptor, name="kvcache-of-somebody-else"))
    assert ours.descriptor.name in str(refused.value)
    ours.close()


def test_memory_is_made_lowest_slot_first_and_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "_PIECE", 2 * PAGE)
    ours, told = Slab.create(7, PAGE), list[int]()
    ours.populate(told.append)
    assert told[0] == 2  # the first piece is there before anything else happens
    assert ours.wait_populated() == ours.populated == 7
    assert told == [2, 4, 6, 7]
    ours.close()


def test_a_slot_is_there_when_all_of_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "_PIECE", 3 * PAGE)
    ours, told = Slab.create(4, 2 * PAGE), list[int]()
    ours.populate(told.append)
    assert ours.wait_populated() == 4
    assert told == [1, 3, 4]
    ours.close()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_descriptor_stays_open() -> None:
    before = open_files()
    with pytest.raises(SlabError):
        Slab.create(1 << 40, 1 << 22)
    assert open_files() == before
    ours = Slab.create(1, PAGE)
    owned = open_files()
    theirs = Slab.attach(ours.descriptor)
    theirs.close()
    with pytest.raises(SlabError):
        Slab.attach(replace(ours.descriptor, name="another"))
    assert open_files() == owned
    ours.close()
    assert open_files() == before


def test_slots_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "_PIECE", PAGE)
    ours, told = Slab.create(3, 2 * PAGE), list[int]()
    ours.populate(told.append)
    assert ours.wait_populated() == 3
    assert told == [1, 2, 3]
    ours.close()


def test_made_memory_costs_no_fault() -> None:
    ours = Slab.create(64, PAGE)
    ours.populate()
    ours.wait_populated()
    code = Path("/proc/self/smaps").read_text()
    at = code.index(f"{ours.address:x}-")
    resident = next(line for line in code[at:].splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) * 1024 >= ours.nbytes
    ours.close()


def test_closing_while_memory_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "_PIECE", PAGE)
    ours = Slab.create(4096, PAGE)
    seen: list[int] = []

    def stop_early(slots: int) -> None:
        seen.append(slots)
        if slots == 3:
            ours._stop.set()

    ours.populate(stop_early)
    ours.close()
    assert seen[-1] < 4096
    assert not ours._thread or not ours._thread.is_alive()


def test_too_little_memory_is_said_and_lived_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slab, "_PIECE", PAGE)
    monkeypatch.setattr(Slab, "_make", lambda self, at, nbytes: 0 if at < 2 * PAGE else 12)
    ours = Slab.create(5, PAGE)
    ours.populate()
    assert ours.wait_populated() == 2
    assert "no more memory for L1" in caplog.text
    assert "Cannot allocate memory" in caplog.text
    ours.close()


def test_a_kernel_without_populate_has_the_pages_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "_MADV_POPULATE_WRITE", 9999)
    ours = Slab.create(16, PAGE)
    ours.populate()
    assert ours.wait_populated() == 16
    assert ours._fd is not None
    assert os.fstat(ours._fd).st_blocks * 512 == ours.nbytes
    ours.close()


def test_a_view_outlives_its_slab() -> None:
    ours = Slab.create(1, PAGE)
    view = ours.view(0)
    view[:4] = b"kept"
    ours.close()
    ours.close()
    assert bytes(view[:4]) == b"kept"


def test_nothing_stays_behind() -> None:
    before = set(Path("/dev/shm").iterdir())
    ours = Slab.create(4, PAGE)
    ours.populate()
    assert set(Path("/dev/shm").iterdir()) == before
    ours.close()
    assert ours.descriptor.name not in Path("/proc/self/maps").read_text()
    assert not any(
        ours.descriptor.name in str(fd.readlink())
        for fd in Path("/proc/self/fd").iterdir()
        if fd.is_symlink() and fd.exists()
    )
