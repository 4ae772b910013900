"""S3-FIFO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from kvcache.eviction.runs import BlockRun, Queue, RunPolicy


class S3Fifo(RunPolicy):
    """S3-FIFO: a small queue on probation, a main queue, a ghost of keys that left the small one.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Counts are kept per
    block; a run moves whole when its tail earned it, since whoever used the tail used the rest.

    Args:
        capacity: blocks.
        small: share of the capacity that is on probation.
        promote: uses on probation from which on a block moves to the main queue.
    """

    def __init__(self, capacity: int, small: float = 0.3, promote: int = 2) -> None:
        super().__init__(capacity)
        self._small = Queue(self._owner)
        self._main = Queue(self._owner)
        self._small_share = max(1, int(capacity * small))
        self._promote = promote
        self._uses: dict[bytes, int] = {}  # of blocks used since they came or were last moved; 1..3
        self._ghost: OrderedDict[bytes, None] = OrderedDict()

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        uses, owner = self._uses, self._owner
        for key in chain[:held]:
            if key in owner:
                uses[key] = min(3, uses.get(key, 0) + 1)

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        ghost = self._ghost
        known = 0  # whoever was used lately was used with its ancestors: the known ones lead
        while known < len(keys) and keys[known] in ghost:
            del ghost[keys[known]]
            known += 1
        if known:
            self._main.push(list(keys[:known]), parent)
            parent = keys[known - 1]
        if known < len(keys):
            self._small.push(list(keys[known:]), parent)

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys)
        for key in keys:
            self._uses.pop(key, None)

    def _order(self) -> Sequence[Queue]:
        small, main = self._small, self._main
        return (small, main) if small.blocks >= self._small_share else (main, small)

    def _offer(self, queue: Queue, run: BlockRun, count: int) -> int:
        small, main, uses = self._small, self._main, self._uses
        enough = self._promote if queue is small else 1
        if queue is small:
            count = min(count, max(1, small.blocks - self._small_share + 1))
        offer = 0
        for key in islice(reversed(run.keys), count):
            if uses.get(key, 0) >= enough:
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
                if (left := uses.pop(key, 0) - 1) > 0:
                    uses[key] = left
            main.rotate(run)
        return 0

    def _left(self, queue: Queue, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self._uses.pop(key, None)
            if queue is self._small:
                self._remember(key)

    def _remember(self, key: bytes) -> None:
        self._ghost[key] = None
        if len(self._ghost) > self._capacity:
            self._ghost.popitem(last=False)


class AibrixS3Fifo(S3Fifo):
    """S3-FIFO with what AIBrix's KV cache has by default: one use is enough for the main queue."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, small=0.3, promote=1)
