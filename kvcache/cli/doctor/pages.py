"""Check which pages L1 uses, and from which NUMA nodes its memory comes."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache import huge_pages, numa
from kvcache.cli.doctor.machine import memory_sizes, slabs_of_other_processes
from kvcache.cli.doctor.options import CheckOptions
from kvcache.cli.doctor.result import CheckResult, ok, warn
from kvcache.huge_pages import HUGE_PAGE
from kvcache.sizes import format_size

if TYPE_CHECKING:
    from kvcache.profiles import Profile

_SHMEM = Path("sys/kernel/mm/transparent_hugepage/shmem_enabled")
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_DISPLAY = "0x03"  # the class of GPUs on the PCI bus


def huge_page_check(profile: Profile | None, options: CheckOptions) -> CheckResult:
    """Check how much of L1 is in huge pages: copies by a CPU are 1.3 times as fast from them."""
    reserved, free = huge_pages.reserved(options.root), huge_pages.free(options.root)
    measured = {"reserved": reserved, "free": free}
    pages = f"{free:,} of {reserved:,} huge pages of {format_size(HUGE_PAGE)} are free"
    if not reserved:
        pages = "none reserved"
    if profile is None:
        return ok("huge pages", pages, **measured)
    front = profile.tiers[0]
    needed = -(-sum(memory_sizes(front).values()) // HUGE_PAGE)
    taken = min(needed, free) if front.options.get("huge_pages", True) else 0
    if needed and taken == needed:
        return ok("huge pages", f"{pages}; L1 takes {needed:,}", **measured)
    transparent = _transparent(options.root)
    rest = "transparent huge pages" if transparent else f"pages of {format_size(mmap.PAGESIZE)}"
    share = f"takes {taken:,} of the {needed:,} that it needs, and for the rest"
    text = f"{pages}; L1 {share if taken else 'takes'} {rest}"
    if transparent:
        return ok("huge pages", text, **measured)
    return warn(
        "huge pages",
        f"{text}, since {_SHMEM.name} is {_setting(options.root) or 'missing'}",
        f"sysctl vm.nr_hugepages={needed + reserved - free}, or as root: echo advise > /{_SHMEM}",
        **measured,
    )


def _transparent(root: Path) -> bool:
    """Whether the kernel gives huge pages to a file in memory that asks for them."""
    return _setting(root) in ("always", "within_size", "advise", "force")


def _setting(root: Path) -> str:
    """Return the chosen word of a file such as "always within_size advise [never] deny force"."""
    return _text(root / _SHMEM).partition("[")[2].partition("]")[0]


def numa_check(options: CheckOptions) -> CheckResult:
    """Report the nodes, those of the GPUs, and whether this process may place memory on them."""
    nodes = numa.nodes(options.root)
    if len(nodes) < 2:
        return ok("numa", "one node")
    parts = [
        f"node {node.number} with {format_size(node.total_nbytes)} "
        f"({format_size(node.free_nbytes)} free)"
        for node in nodes
    ]
    parts += [f"{name} on {node}" for name, node in _gpus(options.root)] or ["no GPU found"]
    for process in slabs_of_other_processes(options.proc):
        shares = ", ".join(
            f"{share:.0%} on node {node}"
            for node, share in sorted(numa.shares(process, options.proc).items())
        )
        parts.append(f"L1 of process {process}: {shares or 'unknown'}")
    text = f"{len(nodes)} nodes: {'; '.join(parts)}"
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        if cause := numa.place(address, mmap.PAGESIZE, [nodes[0].number]):
            return warn(
                "numa",
                f"{text}. L1 cannot be placed on the node of the GPUs ({cause})",
                "in Docker --cap-add SYS_NICE, in Kubernetes capabilities: add: [SYS_NICE]",
            )
    return ok("numa", text)


def _gpus(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the node of each GPU on the PCI bus."""
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = _VENDORS.get(_text(folder / "vendor"))
        if vendor and _text(folder / "class").startswith(_DISPLAY):
            node = _text(folder / "numa_node")
            where = "an unknown node" if node in ("", "-1") else f"node {node}"
            yield f"{vendor} {folder.name}", where


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
