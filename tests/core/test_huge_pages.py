"""A slab takes the free huge pages, and ordinary pages for the rest."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache import huge_pages
from kvcache.huge_pages import HUGE_PAGE
from kvcache.slab import PAGE, Slab, SlabError
from tests.support.forked_children import run_in_child

SLOT = 3 * PAGE
SLOTS = 400  # more than two huge pages


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have files of huge pages, with ordinary pages in their place, and so many of them free."""
    make = os.memfd_create

    def memfd_create(name: str, flags: int) -> int:
        return make(name, flags & ~(os.MFD_HUGETLB | 21 << 26))

    def have(pages: int) -> None:
        monkeypatch.setattr(huge_pages, "free", lambda: pages)
        monkeypatch.setattr(os, "memfd_create", memfd_create)

    return have


def fill(slab: Slab, first: int) -> None:
    for slot in range(slab.slots):
        slab.view(slot)[:] = bytes([(first + slot) % 251]) * slab.slot_nbytes


def check(slab: Slab, first: int) -> None:
    for slot in range(slab.slots):
        assert bytes(slab.view(slot)) == bytes([(first + slot) % 251]) * slab.slot_nbytes


@pytest.mark.parametrize("pages", [0, 1, 2, 3, 1000])
def test_create_uses_free_huge_pages_and_ordinary_ones_for_the_rest(
    pages: int, pretend: Callable[[int], None]
) -> None:
    pretend(pages)
    slab = Slab.create(SLOTS, SLOT)
    files = slab.descriptor.files
    assert [nbytes for _, nbytes in files] == {
        0: [slab.nbytes],
        1: [HUGE_PAGE, slab.nbytes - HUGE_PAGE],
        2: [2 * HUGE_PAGE, slab.nbytes - 2 * HUGE_PAGE],
    }.get(pages, [3 * HUGE_PAGE])
    for path, nbytes in files:
        assert Path(path).stat().st_size == nbytes
    slab.populate()
    assert slab.wait_populated() == SLOTS
    fill(slab, 1)
    attached = Slab.attach(slab.descriptor)
    attached.populate()
    attached.wait_populated()
    check(attached, 1)
    fill(attached, 2)
    check(slab, 2)
    attached.close()
    slab.close()
    assert slab.descriptor.name not in Path("/proc/self/maps").read_text()


def test_create_of_two_files_begins_on_a_huge_page(pretend: Callable[[int], None]) -> None:
    pretend(2)
    slab = Slab.create(SLOTS, SLOT)
    assert slab.address % HUGE_PAGE == 0
    slab.close()


def test_create_without_use_of_huge_pages_takes_none(pretend: Callable[[int], None]) -> None:
    pretend(2)
    slab = Slab.create(SLOTS, SLOT, use_huge_pages=False)
    assert len(slab.descriptor.files) == 1
    slab.close()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL])
def test_create_with_refused_huge_pages_uses_fewer_or_none(
    code: int, pretend: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(8)
    sizes, truncate = list[int](), os.ftruncate

    def ftruncate(fd: int, nbytes: int) -> None:
        sizes.append(nbytes)
        if nbytes > 2 * HUGE_PAGE:
            raise OSError(code, os.strerror(code))
        truncate(fd, nbytes)

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    slab = Slab.create(2 * HUGE_PAGE // PAGE, 2 * PAGE)  # four huge pages
    assert sizes == [4 * HUGE_PAGE, 2 * HUGE_PAGE, 2 * HUGE_PAGE]
    assert len(slab.descriptor.files) == 2
    slab.close()


def test_create_without_any_memory_raises_and_leaves_no_file_open(
    pretend: Callable[[int], None],
) -> None:
    pretend(1)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(SlabError, match="cannot make a slab of"):
        Slab.create(1 << 40, 1 << 22)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_populate_on_an_old_kernel_allocates_the_pages_of_both_files(
    pretend: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcache.slab.MADV_POPULATE_WRITE", 9999)
    pretend(1)
    slab = Slab.create(SLOTS, SLOT)
    slab.populate()
    assert slab.wait_populated() == SLOTS
    for path, nbytes in slab.descriptor.files:
        assert Path(path).stat().st_blocks * 512 == nbytes
    slab.close()


def test_forked_child_has_no_access_to_both_files(pretend: Callable[[int], None]) -> None:
    pretend(1)
    slab = Slab.create(SLOTS, SLOT)

    def mappings() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line.split()[1] for line in lines if slab.descriptor.name in line]

    assert mappings() == ["rw-s", "rw-s"]
    assert run_in_child(mappings) == ["---s", "---s"]
    slab.close()


@pytest.mark.skipif(huge_pages.free() < 2, reason="no huge pages are free")
def test_create_with_real_huge_pages_reserves_them() -> None:
    before = huge_pages.free()
    pages = before // 2
    slots = (before - 1) * HUGE_PAGE // SLOT
    slab = Slab.create(slots, SLOT)
    other = Slab.create(slots, SLOT)  # of the remaining huge pages, and ordinary ones
    assert slab.descriptor.huge_nbytes == -(-slots * SLOT // HUGE_PAGE) * HUGE_PAGE
    assert huge_pages.free() == 0
    for each in (slab, other):
        each.populate()
        assert each.wait_populated() == slots
        fill(each, pages)
        attached = Slab.attach(each.descriptor)
        check(attached, pages)
        attached.close()
    slab.close()
    other.close()
    assert huge_pages.free() == before


def machine(root: Path, *, free: int, reserved: int, groups: str = "", mounts: str = "") -> Path:
    folder = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    folder.mkdir(parents=True)
    (folder / "nr_hugepages").write_text(f"{free + 5}\n")
    (folder / "free_hugepages").write_text(f"{free}\n")
    (folder / "resv_hugepages").write_text(f"{reserved}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts)
    return root


def test_free_leaves_out_reserved_pages(tmp_path: Path) -> None:
    assert huge_pages.free(machine(tmp_path, free=30, reserved=10)) == 20
    assert huge_pages.reserved(tmp_path) == 35


def test_free_without_huge_pages_is_0(tmp_path: Path) -> None:
    assert huge_pages.free(tmp_path) == huge_pages.reserved(tmp_path) == 0


@pytest.mark.parametrize(
    ("limit", "used", "pages"), [("max", 0, 20), (0, 0, 0), (7, 3, 4), (100, 0, 20)]
)
def test_free_is_limited_by_the_control_group(
    limit: int | str, used: int, pages: int, tmp_path: Path
) -> None:
    mounts = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    root = machine(tmp_path, free=20, reserved=0, groups="0::/pod\n", mounts=mounts)
    group = root / "sys/fs/cgroup/pod"
    group.mkdir(parents=True)
    text = limit if isinstance(limit, str) else str(limit * HUGE_PAGE)
    (group / "hugetlb.2MB.max").write_text(f"{text}\n")
    (group / "hugetlb.2MB.current").write_text(f"{used * HUGE_PAGE}\n")
    assert huge_pages.free(root) == pages


def test_free_is_limited_by_a_control_group_of_version_1(tmp_path: Path) -> None:
    mounts = "30 20 0:26 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb\n"
    root = machine(tmp_path, free=20, reserved=0, groups="3:hugetlb:/\n", mounts=mounts)
    group = root / "sys/fs/cgroup/hugetlb"
    group.mkdir(parents=True)
    (group / "hugetlb.2MB.limit_in_bytes").write_text(f"{5 * HUGE_PAGE}\n")
    (group / "hugetlb.2MB.usage_in_bytes").write_text("0\n")
    assert huge_pages.free(root) == 5
