"""A disk tier that kills its process with SIGKILL in the middle of writing a block."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from itertools import count
from typing import Any

from kvcache.tiers.disk import PAGE, DiskTier

LAST = 9  # the number of the write that is cut off

_pwritev = os.pwritev
_writes = count(1)


class KillingDisk(DiskTier):
    """Kills the process at half of write `LAST`."""

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        os.pwritev = _write  # type: ignore[assignment]
        return super().store(keys, blocks, parent)


def _write(fd: int, buffers: Any, offset: int) -> int:
    if next(_writes) < LAST:
        return _pwritev(fd, buffers, offset)
    [pages] = buffers
    _pwritev(fd, [pages[: len(pages) // 2 // PAGE * PAGE]], offset)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
