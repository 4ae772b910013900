"""ARC, adaptive replacement cache.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. Their names for
the state here: ``once`` is T1, ``again`` is T2, ``ghosts_once`` is B1, ``ghosts_again`` is B2, and
``target`` is p.

Two adaptations: a lookup adapts the target for all missing blocks of the request, one after
another; and the paper's REPLACE happens when the index asks for room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvcache.eviction.run_queue import ChainRun, RunQueue
from kvcache.eviction.runs import RunPolicy


class Arc(RunPolicy):
    """Balances blocks used once against blocks used again, with a target that adapts.

    It remembers the keys of as many evicted blocks (ghosts) as it can hold blocks.

    Attributes:
        once: blocks that were used once since they were stored.
        again: blocks that were used at least twice, counting uses as a ghost.
        ghosts_once: keys evicted from ``once``, oldest first.
        ghosts_again: keys evicted from ``again``, oldest first.
        target: blocks that ``once`` should have, 0 to the capacity.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.once = RunQueue(self.runs)
        self.again = RunQueue(self.runs)
        self.ghosts_once: OrderedDict[bytes, None] = OrderedDict()
        self.ghosts_again: OrderedDict[bytes, None] = OrderedDict()
        self.target = 0.0
        self._admits_ghost_again = False  # the incoming block is in `ghosts_again`

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        if keys := self._cut_out(chain[:held]):
            self.again.push(keys, None)
        once, again = self.ghosts_once, self.ghosts_again
        for key in chain[held:]:
            if key in once:
                increase = max(1.0, len(again) / len(once))
                self.target = min(float(self._capacity), self.target + increase)
            elif key in again:
                decrease = max(1.0, len(once) / len(again))
                self.target = max(0.0, self.target - decrease)

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        self._admits_ghost_again = keys[0] in self.ghosts_again
        return len(keys)

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        # A request uses a block together with its ancestors, so the ghosts among the keys lead.
        ghosts: list[bytes] = []
        for key in keys:
            if key not in self.ghosts_once and key not in self.ghosts_again:
                break
            self.ghosts_once.pop(key, None)
            self.ghosts_again.pop(key, None)
            ghosts.append(key)
        if ghosts:
            self.again.push(ghosts, parent)
            parent = ghosts[-1]
        if len(ghosts) < len(keys):
            self.once.push(list(keys[len(ghosts) :]), parent)
        self._trim_ghosts()

    def _queues_to_evict(self) -> Sequence[RunQueue]:
        once, again = self.once, self.again
        over_target = once.blocks > self.target or (
            self._admits_ghost_again and once.blocks == int(self.target)
        )
        return (once, again) if over_target else (again, once)

    def _offer_size(self, queue: RunQueue, run: ChainRun, count: int) -> int:
        if queue is self.once:
            count = min(count, max(1, queue.blocks - int(self.target)))
        return min(len(run.keys), count)

    def _evicted(self, queue: RunQueue, keys: list[bytes]) -> None:
        ghosts = self.ghosts_once if queue is self.once else self.ghosts_again
        for key in reversed(keys):
            ghosts[key] = None
        self._trim_ghosts()

    def _trim_ghosts(self) -> None:
        """Forget the oldest ghosts.

        As in the paper, T1 and B1 together have at most as many keys as the capacity, and all four
        lists together at most twice as many.
        """
        once, again = self.ghosts_once, self.ghosts_again
        while once and self.once.blocks + len(once) > self._capacity:
            once.popitem(last=False)
        while again and len(self.run_of) + len(once) + len(again) > 2 * self._capacity:
            again.popitem(last=False)
