"""NUMA nodes: which one a device or a CPU is on, and the placement of memory on nodes.

The kernel's calls are made by number, since the C library has no functions for them and libnuma
is often not installed. Nodes are read from ``/sys``; ``root`` is another root directory, for tests.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
_MBIND: Final = {"x86_64": 237, "aarch64": 235, "ppc64le": 259, "riscv64": 235, "s390x": 268}
_MOVE_PAGES: Final = {"x86_64": 279, "aarch64": 239, "ppc64le": 301, "riscv64": 239, "s390x": 310}
_PREFERRED, _INTERLEAVE = 1, 3
_SAMPLES: Final = 256  # how many pages of a slab are asked for their node
_BITS: Final = 8 * ctypes.sizeof(ctypes.c_ulong)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A NUMA node of this machine.

    Attributes:
        number: its number.
        cpus: its CPUs.
        total_nbytes: its memory.
        free_nbytes: the part that is free, without file caches.
    """

    number: int
    cpus: frozenset[int]
    total_nbytes: int
    free_nbytes: int


def nodes(root: Path = _ROOT) -> list[NumaNode]:
    """Return the nodes of this machine; none if its kernel knows no nodes."""
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    return sorted(map(_node, folders), key=lambda node: node.number)


def _node(folder: Path) -> NumaNode:
    fields: dict[str, int] = {}
    for line in (folder / "meminfo").read_text().splitlines():  # Node 0 MemTotal:  24684096 kB
        name, _, value = line.partition(":")
        if name.endswith(("MemTotal", "MemFree")):
            fields[name.split()[-1]] = 1024 * int(value.split()[0])
    return NumaNode(
        int(folder.name.removeprefix("node")),
        frozenset(_numbers((folder / "cpulist").read_text())),
        fields.get("MemTotal", 0),
        fields.get("MemFree", 0),
    )


def _numbers(text: str) -> list[int]:
    """Return the numbers of a list such as "0-3,8"."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def nodes_of_pci(address: str, root: Path = _ROOT) -> tuple[int, ...]:
    """Return the node of the PCI device with this address, such as ``0000:3b:00.0``.

    Returns:
        its number; nothing if the node is unknown or the machine has one node only.
    """
    known = [node.number for node in nodes(root)]
    try:
        number = int((root / "sys/bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return ()
    return (number,) if number in known and len(known) > 1 else ()


def nodes_of_cpus(cpus: Collection[int], root: Path = _ROOT) -> tuple[int, ...]:
    """Return the nodes of these CPUs; nothing if they are on all nodes that have CPUs."""
    with_cpus = [node for node in nodes(root) if node.cpus]
    found = tuple(node.number for node in with_cpus if not node.cpus.isdisjoint(cpus))
    return found if len(found) < len(with_cpus) else ()


def place(address: int, nbytes: int, on: Sequence[int]) -> str:
    """Have memory that is allocated from now on in this range come from the nodes ``on``.

    From one node if there is one, else from all in turn. Memory comes from other nodes when these
    are full. In a file of ordinary pages this holds for every process that maps the file; with huge
    pages, for this mapping alone.

    Args:
        address: of the first page.
        nbytes: whole pages.
        on: numbers of nodes, at least one.

    Returns:
        the cause of a failure, or "".
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"not implemented on {platform.machine()}"
    mask = (ctypes.c_ulong * (max(on) // _BITS + 1))()
    for node in on:
        mask[node // _BITS] |= 1 << node % _BITS
    failed = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_long(_PREFERRED if len(on) == 1 else _INTERLEAVE),
        mask,
        ctypes.c_ulong(_BITS * len(mask) + 1),  # the kernel reads one bit less
        ctypes.c_ulong(0),
    )
    return os.strerror(ctypes.get_errno()) if failed else ""


def shares(process: int, proc: Path = Path("/proc")) -> dict[int, float]:
    """Return which share of the slabs that a process has mapped is on each node, by samples.

    Returns:
        by number of the node; nothing if no page is allocated or the kernel refuses to report it.
    """
    addresses: list[int] = []
    try:
        for line in (proc / str(process) / "maps").read_text().splitlines():
            if "/memfd:kvcache-" in line:
                begin, end = (int(text, 16) for text in line.split()[0].split("-"))
                step = max((end - begin) // _SAMPLES // mmap.PAGESIZE, 1) * mmap.PAGESIZE
                addresses += range(begin, end, step)
    except OSError:
        return {}
    number = _MOVE_PAGES.get(platform.machine())
    if not addresses or number is None:
        return {}
    found = (ctypes.c_int * len(addresses))()
    failed = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_int(process),
        ctypes.c_ulong(len(addresses)),
        (ctypes.c_void_p * len(addresses))(*addresses),
        None,  # move nothing, and report where the pages are
        found,
        ctypes.c_int(0),
    )
    counts = Counter(node for node in found if node >= 0)  # below 0: an errno
    return {} if failed else {node: count / counts.total() for node, count in counts.items()}
