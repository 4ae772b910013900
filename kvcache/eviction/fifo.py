"""First in, first out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcache.eviction.policy import Keep
from kvcache.eviction.runs import Queue, Run, RunPolicy


class Fifo(RunPolicy):
    """First in, first out; a block stays while a later block of its chain does."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = Queue(self._owner)

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        pass

    def add(self, keys: Sequence[bytes], after: bytes | None, now: float) -> None:
        self._queue.push(list(keys), after)

    def victims(self, keep: Keep) -> Iterator[bytes]:
        queue, spared = self._queue, set[Run]()
        gone = False
        while len(queue):
            run = queue.oldest()
            if run in spared:
                if not gone:
                    return
                spared.clear()  # what was kept for a block that continued it may go by now
                gone = False
            if keep(run.keys[-1]):
                queue.rotate(run)
                spared.add(queue.newest())
            else:
                gone = True
                yield queue.pop_tail(run)
