"""First in, first out."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.eviction.run_queue import RunQueue
from kvcache.eviction.runs import RunPolicy


class Fifo(RunPolicy):
    """First in, first out; a block stays as long as a later block of its chain stays."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = RunQueue(self.runs)

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        pass

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self._queue.push(list(keys), parent)

    def _queues_to_evict(self) -> Sequence[RunQueue]:
        return (self._queue,)
