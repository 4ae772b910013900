"""What this process remembers of the blocks of a lower tier, for ``lookup = "load"``.

1. The tier is the only source: a block is remembered as held after the tier stored or loaded it,
   and as missed after the tier returned no block or declined it.
2. A miss is forgotten after a few seconds, because another process may store the block.
3. Both tables are bounded; the entry that was changed longest ago leaves first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from kvcache.keys import namespaced_key

MISS_S: Final = 5.0
"""How long a missed block is not asked for again."""

MAX_REMEMBERED: Final = 1 << 16
"""Entries of each table, about 15 MB."""


class RememberedBlocks:
    """The blocks that a tier is known to hold, or to lack. Safe to call from several threads.

    Args:
        clock: the current time in seconds.
        limit: the most entries of each table.

    Attributes:
        limit: as the argument.
    """

    def __init__(self, clock: Callable[[], float], limit: int = MAX_REMEMBERED) -> None:
        self._clock = clock
        self.limit = limit
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, None] = OrderedDict()
        self._missed_at: OrderedDict[bytes, float] = OrderedDict()

    def observe(self, namespace: bytes, keys: Sequence[bytes], held: Sequence[bool]) -> None:
        """Remember which of ``keys`` the tier holds now."""
        with self._lock:
            now = self._clock()
            for key, is_held in zip(keys, held, strict=True):
                name = namespaced_key(namespace, key)
                self._held.pop(name, None)
                self._missed_at.pop(name, None)
                if is_held:
                    self._held[name] = None
                else:
                    self._missed_at[name] = now
            for table in (self._held, self._missed_at):
                while len(table) > self.limit:
                    table.popitem(last=False)

    def may_hold(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Return ``False`` for each block that was missed a short time ago, else ``True``."""
        with self._lock:
            if not self._missed_at:
                return [True] * len(keys)
            oldest = self._clock() - MISS_S
            names = (namespaced_key(namespace, key) for key in keys)
            return [self._missed_at.get(name, oldest) <= oldest for name in names]

    def holds(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Return ``True`` for each block that the tier stored or loaded."""
        with self._lock:
            return [namespaced_key(namespace, key) in self._held for key in keys]
