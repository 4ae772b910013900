"""The doctor's checks of huge pages and NUMA nodes, on machines that a test describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache import numa
from kvcache.cli.doctor import pages
from kvcache.cli.doctor.options import CheckOptions
from kvcache.profiles import Profile, load_profile

NEVER = "always within_size advise [never] deny force"
ADVISE = "always within_size [advise] never deny force"


def profile(**variables: str) -> Profile:
    """Return a profile with an L1 of 32 huge pages."""
    return load_profile("l1-only", environ={"KVCACHE__L1__CAPACITY": "64MiB"} | variables)


def write(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def machine(root: Path, reserved: int, free: int, shmem: str = NEVER) -> CheckOptions:
    folder = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    write(folder, nr_hugepages=str(reserved), free_hugepages=str(free), resv_hugepages="0")
    write(root / "sys/kernel/mm/transparent_hugepage", shmem_enabled=shmem)
    return CheckOptions(root=root, proc=root / "proc")


@pytest.mark.parametrize(
    ("reserved", "free", "shmem", "status", "text"),
    [
        (64, 40, NEVER, "OK", "40 of 64 huge pages of 2MiB are free; L1 takes 32"),
        (
            64,
            20,
            NEVER,
            "WARN",
            "L1 takes 20 of the 32 that it needs, and for the rest pages of 4KiB",
        ),
        (
            64,
            20,
            ADVISE,
            "OK",
            "takes 20 of the 32 that it needs, and for the rest transparent huge",
        ),
        (
            0,
            0,
            NEVER,
            "WARN",
            "none reserved; L1 takes pages of 4KiB, since shmem_enabled is never",
        ),
        (0, 0, ADVISE, "OK", "none reserved; L1 takes transparent huge pages"),
    ],
)
def test_huge_page_check_reports_the_pages_of_l1(
    reserved: int, free: int, shmem: str, status: str, text: str, tmp_path: Path
) -> None:
    found = pages.huge_page_check(profile(), machine(tmp_path, reserved, free, shmem))
    assert found.status == status
    assert text in found.what
    assert found.measured == {"reserved": reserved, "free": free}
    if status == "WARN":
        assert found.what.endswith("since shmem_enabled is never")
        assert found.fix.startswith(f"sysctl vm.nr_hugepages={32 + reserved - free}, or ")
        assert "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled" in found.fix


def test_huge_page_check_of_an_l1_without_huge_pages(tmp_path: Path) -> None:
    found = pages.huge_page_check(
        profile(KVCACHE__L1__HUGE_PAGES="false"), machine(tmp_path, 64, 64)
    )
    assert "64 of 64 huge pages of 2MiB are free; L1 takes pages of 4KiB" in found.what


def test_huge_page_check_without_a_profile_reports_the_machine(tmp_path: Path) -> None:
    found = pages.huge_page_check(None, machine(tmp_path, 64, 20))
    assert (found.status, found.what) == ("OK", "20 of 64 huge pages of 2MiB are free")


def test_huge_page_check_on_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    found = pages.huge_page_check(profile(), CheckOptions(root=tmp_path))
    assert found.what.endswith("since shmem_enabled is missing")


def nodes(root: Path, count: int) -> CheckOptions:
    for number in range(count):
        write(
            root / f"sys/devices/system/node/node{number}",
            cpulist=str(number),
            meminfo=f"Node {number} MemTotal: 4096 kB\nNode {number} MemFree: 2048 kB",
        )
    return CheckOptions(root=root, proc=root / "proc")


def test_numa_check_of_one_node(tmp_path: Path) -> None:
    found = pages.numa_check(nodes(tmp_path, 1))
    assert (found.status, found.what) == ("OK", "one node")


def test_numa_check_reports_nodes_gpus_and_slabs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = nodes(tmp_path, 2)
    devices = tmp_path / "sys/bus/pci/devices"
    gpu = {"vendor": "0x10de", "class": "0x030200"}
    write(devices / "0000:3b:00.0", **gpu, numa_node="1")
    write(devices / "0000:5e:00.0", **gpu, numa_node="-1")
    write(devices / "0000:86:00.0", **(gpu | {"class": "0x020000"}), numa_node="1")
    fd = tmp_path / "proc/77/fd"
    fd.mkdir(parents=True)
    (tmp_path / "memfd:kvcache-abc").write_bytes(bytes(8))
    (fd / "5").symlink_to(tmp_path / "memfd:kvcache-abc")
    monkeypatch.setattr(numa, "shares", lambda process, proc: {1: 0.75, 0: 0.25})
    monkeypatch.setattr(numa, "place", lambda *_: "")
    found = pages.numa_check(options)
    assert found.status == "OK"
    assert found.what == (
        "2 nodes: node 0 with 4MiB (2MiB free); node 1 with 4MiB (2MiB free); "
        "NVIDIA 0000:3b:00.0 on node 1; NVIDIA 0000:5e:00.0 on an unknown node; "
        "L1 of process 77: 25% on node 0, 75% on node 1"
    )


def test_numa_check_in_a_container_that_may_not_place_memory_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "place", lambda *_: "Operation not permitted")
    found = pages.numa_check(nodes(tmp_path, 2))
    assert found.status == "WARN"
    assert found.what.endswith(
        "no GPU found. L1 cannot be placed on the node of the GPUs (Operation not permitted)"
    )
    assert "SYS_NICE" in found.fix
