"""Runs, and queues of them: the unit in which most policies move blocks.

A *run* is consecutive blocks of one chain, head first::

    queue   oldest                         newest
            [a0 a1 a2]   [b0 b1]   [a3 a4 a5]
                    ^                        a run gives up its tail first

Always true: every key of a policy is in exactly one run, and a run is a stretch of one chain.
A run whose tail is kept goes to the newest end, since it is in use.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from kvcache.eviction.policy import Policy, Take


class BlockRun:
    """A stretch of one chain: ``keys`` head first, continuing the block ``parent``."""

    __slots__ = ("keys", "parent", "queue")

    def __init__(self, queue: Queue, keys: list[bytes], parent: bytes | None) -> None:
        self.queue = queue
        self.keys = keys
        self.parent = parent


class Queue:
    """Runs from oldest to newest, and how many blocks they hold together."""

    def __init__(self, owner: dict[bytes, BlockRun]) -> None:
        self._owner = owner  # key -> its run; shared by the queues of one policy
        self._runs: OrderedDict[BlockRun, None] = OrderedDict()
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._runs)

    def oldest(self) -> BlockRun:
        return next(iter(self._runs))

    def newest(self) -> BlockRun:
        return next(reversed(self._runs))

    def push(self, keys: list[bytes], parent: bytes | None) -> None:
        """Make ``keys`` the newest; they join the newest run when they continue it."""
        run = self.newest() if self._runs else None
        if run is not None and run.keys[-1] == parent:
            run.keys += keys
        else:
            run = BlockRun(self, keys, parent)
            self._runs[run] = None
        owner = self._owner
        for key in keys:
            owner[key] = run
        self.blocks += len(keys)

    def extend(self, run: BlockRun, keys: list[bytes]) -> None:
        """Append to ``run`` the blocks that continue it, and make all of it the newest."""
        run.keys += keys
        self._runs.move_to_end(run)
        owner = self._owner
        for key in keys:
            owner[key] = run
        self.blocks += len(keys)

    def drop(self, run: BlockRun) -> None:
        """Take ``run`` out; its keys stay with the caller."""
        del self._runs[run]
        self.blocks -= len(run.keys)

    def rotate(self, run: BlockRun) -> None:
        """Make ``run`` the newest. It joins the run it continues, so that a chain built a block at
        a time, in turns with others, is not gone through a block at a time again."""
        head = self._owner.get(run.parent) if run.parent is not None else None
        if head is not None and head.queue is self and head.keys[-1] == run.parent:
            self.drop(run)
            self.extend(head, run.keys)
        else:
            self._runs.move_to_end(run)

    def cut_tail(self, run: BlockRun, count: int) -> list[bytes]:
        """Forget the last ``count`` keys of ``run``, and give them, head first."""
        keys, owner = run.keys[-count:], self._owner
        del run.keys[-count:]
        for key in keys:
            del owner[key]
        self.blocks -= count
        if not run.keys:
            del self._runs[run]
        return keys

    def cut_head(self, run: BlockRun, count: int) -> None:
        """Take the first ``count`` keys out of ``run``; their owner is for the caller to set."""
        self.blocks -= count
        if count == len(run.keys):
            del self._runs[run]
        else:
            run.parent = run.keys[count - 1]
            del run.keys[:count]

    def take(self, run: BlockRun, keys: AbstractSet[bytes]) -> None:
        """Take ``keys`` out of ``run``, wherever in it they are; the slow way."""
        left = [key for key in run.keys if key not in keys]
        self.blocks -= len(run.keys) - len(left)
        run.keys = left
        if not left:
            del self._runs[run]


class RunPolicy(Policy):
    """What most policies share: an owner for every key, one or more queues of runs."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._owner: dict[bytes, BlockRun] = {}

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        gone = set(keys)
        for run in {self._owner.pop(key): None for key in keys}:
            run.queue.take(run, gone)

    def evict(self, count: int, take: Take) -> None:
        spared = set[BlockRun]()
        moved = False
        while count:
            for queue in self._order():
                if len(queue) and (run := queue.oldest()) not in spared:
                    break
            else:
                if not moved:
                    return
                spared.clear()  # some may go by now, or have come to stand behind the spared
                moved = False
                continue
            offer = self._offer(queue, run, count)
            if not offer:
                moved = True
                continue
            offered = run.keys[-offer:]
            if went := take(offered):
                moved = True
                count -= went
                self._left(queue, queue.cut_tail(run, went))
            if went < len(offered):
                tail = run.keys[-1]
                queue.rotate(run)
                spared.add(self._owner[tail])

    @abstractmethod
    def _order(self) -> Sequence[Queue]:
        """Of which queue the oldest run goes first; the next one is asked where all of it stays."""

    def _offer(self, queue: Queue, run: BlockRun, count: int) -> int:
        """How many blocks of ``run`` may go now, ``count`` at most; none when it was put elsewhere
        instead."""
        return min(len(run.keys), count)

    def _left(self, queue: Queue, keys: list[bytes]) -> None:
        """``keys`` of a run of ``queue`` have left, the last of them first."""

    def _take(self, keys: Sequence[bytes]) -> list[bytes]:
        """Take ``keys`` out of their runs; give those that had one, in order.

        Whoever uses a block uses its ancestors, so what is used of a run is its head: whole slices
        are compared and cut, and no block is touched by itself.
        """
        owner = self._owner
        taken: list[bytes] = []
        at = 0
        while at < len(keys):
            run = owner.get(keys[at])
            if run is None:
                at += 1
                continue
            count = min(len(run.keys), len(keys) - at)
            if run.keys[:count] != list(keys[at : at + count]):
                pairs = zip(run.keys, keys[at : at + count], strict=False)
                count = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
            if count:
                taken += run.keys[:count]
                run.queue.cut_head(run, count)
                at += count
            else:  # asked for without its ancestors
                run.queue.take(run, {keys[at]})
                taken.append(keys[at])
                at += 1
        return taken
