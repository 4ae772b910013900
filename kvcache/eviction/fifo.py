"""First in, first out."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.eviction.runs import Queue, RunPolicy


class Fifo(RunPolicy):
    """First in, first out; a block stays while a later block of its chain does."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = Queue(self._owner)

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        pass

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self._queue.push(list(keys), parent)

    def _order(self) -> Sequence[Queue]:
        return (self._queue,)
