"""NUMA nodes of devices and CPUs, and the placement of memory."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from kvcache import numa
from kvcache.numa import NumaNode
from kvcache.slab import PAGE, Slab

MIB = 1 << 20


def machine(root: Path, *cpu_lists: str) -> Path:
    """Make a machine with a node for each list of CPUs, and a GPU on node 1."""
    for number, cpus in enumerate(cpu_lists):
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
        (folder / "meminfo").write_text(
            f"Node {number} MemTotal:       2048 kB\nNode {number} MemFree:        1024 kB\n"
            f"Node {number} MemUsed:        1024 kB\n"
        )
    for address, node in [("0000:3b:00.0", 1), ("0000:5e:00.0", -1), ("0000:86:00.0", 7)]:
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    return root


def test_nodes_have_their_cpus_and_memory(tmp_path: Path) -> None:
    assert numa.nodes(machine(tmp_path, "0-1,4", "2-3,5", "")) == [
        NumaNode(0, frozenset({0, 1, 4}), 2 * MIB, MIB),
        NumaNode(1, frozenset({2, 3, 5}), 2 * MIB, MIB),
        NumaNode(2, frozenset(), 2 * MIB, MIB),
    ]


def test_nodes_of_a_kernel_without_nodes_are_none(tmp_path: Path) -> None:
    assert numa.nodes(tmp_path) == []
    assert numa.nodes_of_cpus([0], tmp_path) == ()
    assert numa.nodes_of_pci("0000:3b:00.0", tmp_path) == ()


@pytest.mark.parametrize(
    ("address", "nodes"),
    [("0000:3b:00.0", (1,)), ("0000:5e:00.0", ()), ("0000:86:00.0", ()), ("0000:ff:00.0", ())],
    ids=["on node 1", "unknown node", "missing node", "missing device"],
)
def test_nodes_of_pci_is_the_node_of_the_device(
    address: str, nodes: tuple[int, ...], tmp_path: Path
) -> None:
    assert numa.nodes_of_pci(address, machine(tmp_path, "0-1", "2-3")) == nodes


def test_nodes_of_pci_with_one_node_are_none(tmp_path: Path) -> None:
    root = machine(tmp_path, "0-1")
    (root / "sys/bus/pci/devices/0000:3b:00.0/numa_node").write_text("0\n")
    assert numa.nodes_of_pci("0000:3b:00.0", root) == ()


@pytest.mark.parametrize(
    ("cpus", "nodes"), [([0], (0,)), ([2, 3], (1,)), ([0, 3], ()), ([0, 1, 2, 3], ()), ([9], ())]
)
def test_nodes_of_cpus_on_all_nodes_are_none(
    cpus: list[int], nodes: tuple[int, ...], tmp_path: Path
) -> None:
    assert numa.nodes_of_cpus(cpus, machine(tmp_path, "0-1", "2-3", "")) == nodes


def policy(address: int) -> str:
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{address:x} "))


has_numa = pytest.mark.skipif(not numa.nodes(), reason="a kernel without NUMA nodes")


@has_numa
def test_place_sets_the_policy_of_the_memory() -> None:
    with mmap.mmap(-1, MIB) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert policy(address) == "default"
        node = numa.nodes()[0].number
        assert numa.place(address, MIB, [node]) == ""
        assert policy(address).startswith("prefer")


@has_numa
def test_place_on_a_missing_node_returns_the_cause() -> None:
    with mmap.mmap(-1, MIB) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert numa.place(address, MIB, [1000]) == "Invalid argument"


@has_numa
def test_slab_is_placed_before_it_is_allocated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    node = numa.nodes()[0].number
    slab = Slab.create(8, PAGE, nodes=[node])
    assert policy(slab.address).startswith("prefer")
    attached = Slab.attach(slab.descriptor)
    assert policy(attached.address).startswith("prefer")
    slab.populate()
    assert slab.wait_populated() == 8
    assert [record.getMessage() for record in caplog.records] == [
        f"kvcache: slab: L1 is placed on NUMA node {node}"
    ]
    attached.close()
    slab.close()


def test_slab_that_cannot_be_placed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    slab = Slab.create(8, PAGE, nodes=[1000])
    assert "L1 not placed on NUMA node 1000 (Invalid argument)" in caplog.text
    slab.close()


@has_numa
def test_shares_of_a_slab_are_those_of_its_allocated_pages() -> None:
    slab = Slab.create(64, PAGE)
    slab.populate()
    slab.wait_populated()
    assert sum(numa.shares(os.getpid()).values()) == pytest.approx(1.0)
    slab.close()


def test_shares_of_a_process_without_slabs_are_none(tmp_path: Path) -> None:
    assert numa.shares(1, tmp_path) == {}
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "maps").write_text("7f00-7f10 rw-s 00000000 00:01 5 /memfd:other (deleted)\n")
    assert numa.shares(1, tmp_path) == {}
