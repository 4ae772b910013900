"""Least recently used."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.eviction.fifo import Fifo


class Lru(Fifo):
    """Least recently used, by request: a lookup makes its blocks the newest; tails go first."""

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        keys = self._cut_out(chain[:held])
        if keys:
            self._queue.push(keys, None)

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self._queue.push_renewed(list(keys), parent)
