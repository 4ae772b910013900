"""A disk tier that kills its process with SIGKILL in the middle of writing a block."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from kvcache.tiers.disk import PAGE, DiskTier

LAST = 9  # the number of the block that is cut off

_pwritev = os.pwritev
_written = 0  # blocks


class KillingDisk(DiskTier):
    """Kills the process at half of block `LAST`."""

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        os.pwritev = _write  # type: ignore[assignment]
        return super().store(keys, blocks, parent)


def _write(fd: int, buffers: Any, offset: int) -> int:
    global _written
    whole = LAST - 1 - _written
    _written += len(buffers)
    if whole >= len(buffers):
        return _pwritev(fd, buffers, offset)
    half = buffers[whole][: len(buffers[whole]) // 2 // PAGE * PAGE]
    _pwritev(fd, [*buffers[:whole], half], offset)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
