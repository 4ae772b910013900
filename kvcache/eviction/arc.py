"""ARC: blocks used once, blocks used again, and a target for how many there are of each.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, as it is there:
``_once`` is their T1 and ``_again`` T2, the ghosts are B1 and B2, the target is p. A request's
blocks are taken one after another at look-up, which adapts the target; their REPLACE is done when
room is made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvcache.eviction.runs import BlockRun, Queue, RunPolicy


class Arc(RunPolicy):
    """Adaptive replacement cache. It remembers as many blocks that left as it holds."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._once = Queue(self._owner)
        self._again = Queue(self._owner)
        self._left_once: OrderedDict[bytes, None] = OrderedDict()
        self._left_again: OrderedDict[bytes, None] = OrderedDict()
        self._target = 0.0  # blocks of `_once`
        self._back = False  # a block that left `_again` is to be held

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        if keys := self._take(chain[:held]):
            self._again.push(keys, None)
        once, again = self._left_once, self._left_again
        for key in chain[held:]:
            if key in once:
                more = max(1.0, len(again) / len(once))
                self._target = min(float(self._capacity), self._target + more)
            elif key in again:
                less = max(1.0, len(once) / len(again))
                self._target = max(0.0, self._target - less)

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        self._back = keys[0] in self._left_again
        return len(keys)

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        known: list[bytes] = []
        for key in keys:  # whoever was used lately was used with its ancestors: the known ones lead
            if key not in self._left_once and key not in self._left_again:
                break
            self._left_once.pop(key, None)
            self._left_again.pop(key, None)
            known.append(key)
        if known:
            self._again.push(known, parent)
            parent = known[-1]
        if len(known) < len(keys):
            self._once.push(list(keys[len(known) :]), parent)
        self._trim()

    def _order(self) -> Sequence[Queue]:
        once, again = self._once, self._again
        full = once.blocks > self._target or (self._back and once.blocks == int(self._target))
        return (once, again) if full else (again, once)

    def _offer(self, queue: Queue, run: BlockRun, count: int) -> int:
        if queue is self._once:
            count = min(count, max(1, queue.blocks - int(self._target)))
        return min(len(run.keys), count)

    def _left(self, queue: Queue, keys: list[bytes]) -> None:
        ghosts = self._left_once if queue is self._once else self._left_again
        for key in reversed(keys):
            ghosts[key] = None
        self._trim()

    def _trim(self) -> None:
        """Forget ghosts: with what was used once there are no more than the capacity, with all no
        more than twice that."""
        once, again = self._left_once, self._left_again
        while once and self._once.blocks + len(once) > self._capacity:
            once.popitem(last=False)
        while again and len(self._owner) + len(once) + len(again) > 2 * self._capacity:
            again.popitem(last=False)
