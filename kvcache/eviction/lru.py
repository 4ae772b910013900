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
        run = self.run_of.get(parent) if parent is not None else None
        if run is not None and run.keys[-1] == parent:
            self._queue.extend(run, list(keys))
        else:
            self._queue.push(list(keys), parent)
