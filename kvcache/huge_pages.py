"""How many huge pages of 2 MiB this process may take.

An administrator reserves them (``vm.nr_hugepages``); they serve nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvcache import host_memory

HUGE_PAGE: Final = 2 << 20
_FOLDER: Final = Path("sys/kernel/mm/hugepages/hugepages-2048kB")


def reserved(root: Path = Path("/")) -> int:
    """Return how many huge pages this machine has, free or not."""
    return _number(root / _FOLDER / "nr_hugepages")


def free(root: Path = Path("/")) -> int:
    """Return how many huge pages this process may take now.

    Not those that another process has mapped and not touched yet, nor more than the control groups
    of this container allow: Kubernetes allows none to a pod that requests none.
    """
    pages = _number(root / _FOLDER / "free_hugepages") - _number(root / _FOLDER / "resv_hugepages")
    allowed = host_memory.free_huge_pages(root)
    return max(0, pages if allowed is None else min(pages, allowed // HUGE_PAGE))


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii")) if file.exists() else 0
