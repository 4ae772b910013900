"""S3-FIFO.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Uses are counted per
block; a run moves as a whole when its tail has enough uses, since a request that uses the tail also
uses the blocks before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import islice

from kvcache.eviction.run_queue import ChainRun, RunQueue
from kvcache.eviction.runs import RunPolicy

_MAX_USES = 3  # the paper's counter has two bits; a larger count would only delay eviction


class S3Fifo(RunPolicy):
    """A small queue for new blocks, a main queue for reused ones, and a ghost list.

    Args:
        capacity: blocks.
        small: share of the capacity that the small queue has.
        promote: uses in the small queue after which a block moves to the main queue.

    Attributes:
        small: blocks that were stored lately.
        main: blocks that were used often enough, or came back while they were a ghost.
        uses: uses of a block since it was stored or moved, 1 to 3; no entry means none.
        ghosts: keys evicted from the small queue, oldest first; at most as many as the capacity.
    """

    def __init__(self, capacity: int, small: float = 0.3, promote: int = 2) -> None:
        super().__init__(capacity)
        self.small = RunQueue(self.runs)
        self.main = RunQueue(self.runs)
        self.uses: dict[bytes, int] = {}
        self.ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._small_capacity = max(1, int(capacity * small))  # blocks
        self._promote = promote

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        uses, run_of = self.uses, self.run_of
        for key in chain[:held]:
            if key in run_of:
                uses[key] = min(_MAX_USES, uses.get(key, 0) + 1)

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        # A request uses a block together with its ancestors, so the ghosts among the keys lead.
        ghosts = self.ghosts
        count = 0
        while count < len(keys) and keys[count] in ghosts:
            del ghosts[keys[count]]
            count += 1
        if count:
            self.main.push(list(keys[:count]), parent)
            parent = keys[count - 1]
        if count < len(keys):
            self.small.push(list(keys[count:]), parent)

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys)
        for key in keys:
            self.uses.pop(key, None)

    def check(self, held: Collection[bytes]) -> None:
        super().check(held)
        assert set(self.uses) <= set(held)
        assert all(1 <= uses <= _MAX_USES for uses in self.uses.values())

    def _queues_to_evict(self) -> Sequence[RunQueue]:
        small, main = self.small, self.main
        return (small, main) if small.blocks >= self._small_capacity else (main, small)

    def _offer_size(self, queue: RunQueue, run: ChainRun, count: int) -> int:
        small, main, uses = self.small, self.main, self.uses
        uses_to_stay = self._promote if queue is small else 1
        if queue is small:
            count = min(count, max(1, small.blocks - self._small_capacity + 1))
        offer = 0
        for key in islice(reversed(run.keys), count):
            if uses.get(key, 0) >= uses_to_stay:
                break
            offer += 1
        if offer:
            return offer
        if queue is small:
            small.drop(run)
            for key in run.keys:
                uses.pop(key, None)
            main.push(run.keys, run.parent)
        else:
            for key in run.keys:
                if (remaining := uses.pop(key, 0) - 1) > 0:
                    uses[key] = remaining
            main.rotate(run)
        return 0

    def _evicted(self, queue: RunQueue, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self.uses.pop(key, None)
            if queue is self.small:
                self._add_ghost(key)

    def _add_ghost(self, key: bytes) -> None:
        self.ghosts[key] = None
        if len(self.ghosts) > self._capacity:
            self.ghosts.popitem(last=False)


class AibrixS3Fifo(S3Fifo):
    """S3-FIFO with the defaults of AIBrix's KV cache: one use moves a block to the main queue."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, small=0.3, promote=1)
