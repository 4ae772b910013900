"""Policies: in which order blocks leave a full tier.

A policy only orders keys. It is told of accesses a request at a time, because a request's blocks
live and die together, and it answers with victims, lazily. It holds no bytes, takes no lock, starts
no thread and reads no clock: the index calls it under its own lock and hands it the time.

The unit of the policies here is a *run*: consecutive blocks of one chain, head first::

    queue   oldest                         newest
            [a0 a1 a2]   [b0 b1]   [a3 a4 a5]
                    ^                        a run gives up its tail first

Always true here:

* Every key known to a policy is in exactly one run, and a run is a stretch of one chain.
* What ``victims`` yields is forgotten as it is yielded. A key that ``keep`` claims is not yielded,
  nor is anything before it in its run; that run goes to the newest end, since it is in use.
* State is a bounded number of entries per block held; the ghost of S3-FIFO is bounded too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

Keep = Callable[[bytes], bool]


class Policy(ABC):
    """Orders the keys of one index.

    Args:
        capacity: blocks that the index can hold.
    """

    @abstractmethod
    def __init__(self, capacity: int) -> None: ...

    @abstractmethod
    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        """A request asked for ``chain``, from its first block; ``chain[:held]`` were there."""

    @abstractmethod
    def admit(self, keys: Sequence[bytes], after: bytes | None, now: float) -> int:
        """Say how many leading ``keys`` are worth a slot of a full tier; asked before any copy."""

    @abstractmethod
    def add(self, keys: Sequence[bytes], after: bytes | None, now: float) -> None:
        """``keys``, a stretch of a chain that continues ``after``, are held from now on."""

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Forget keys that left for another reason than eviction."""

    @abstractmethod
    def victims(self, keep: Keep) -> Iterator[bytes]:
        """Yield, and forget, the keys to go, first to go first, none for which ``keep(key)``."""


class Run:
    """A stretch of one chain: ``keys`` head first, continuing the block ``after``."""

    __slots__ = ("after", "keys", "queue")

    def __init__(self, queue: Queue, keys: list[bytes], after: bytes | None) -> None:
        self.queue = queue
        self.keys = keys
        self.after = after


class Queue:
    """Runs from oldest to newest, and how many blocks they hold together."""

    def __init__(self, owner: dict[bytes, Run]) -> None:
        self._owner = owner  # key -> its run; shared by the queues of one policy
        self._runs: OrderedDict[Run, None] = OrderedDict()
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._runs)

    def oldest(self) -> Run:
        return next(iter(self._runs))

    def newest(self) -> Run:
        return next(reversed(self._runs))

    def push(self, keys: list[bytes], after: bytes | None) -> None:
        """Make ``keys`` the newest; they join the newest run when they continue it."""
        run = self.newest() if self._runs else None
        if run is not None and run.keys[-1] == after:
            run.keys += keys
        else:
            run = Run(self, keys, after)
            self._runs[run] = None
        self._owner.update(dict.fromkeys(keys, run))
        self.blocks += len(keys)

    def extend(self, run: Run, keys: list[bytes]) -> None:
        """Append to ``run`` the blocks that continue it, and make all of it the newest."""
        run.keys += keys
        self._runs.move_to_end(run)
        self._owner.update(dict.fromkeys(keys, run))
        self.blocks += len(keys)

    def drop(self, run: Run) -> None:
        """Take ``run`` out; its keys stay with the caller."""
        del self._runs[run]
        self.blocks -= len(run.keys)

    def rotate(self, run: Run) -> None:
        """Make ``run`` the newest. It joins the run it continues, so that a chain built a block at
        a time, in turns with others, is not gone through a block at a time again."""
        head = self._owner.get(run.after) if run.after is not None else None
        if head is not None and head.queue is self and head.keys[-1] == run.after:
            self.drop(run)
            self.extend(head, run.keys)
        else:
            self._runs.move_to_end(run)

    def pop_tail(self, run: Run) -> bytes:
        key = run.keys.pop()
        del self._owner[key]
        self.blocks -= 1
        if not run.keys:
            del self._runs[run]
        return key

    def cut_head(self, run: Run, count: int) -> None:
        """Take the first ``count`` keys out of ``run``; their owner is for the caller to set."""
        self.blocks -= count
        if count == len(run.keys):
            del self._runs[run]
        else:
            run.after = run.keys[count - 1]
            del run.keys[:count]

    def take(self, run: Run, keys: AbstractSet[bytes]) -> None:
        """Take ``keys`` out of ``run``, wherever in it they are; the slow way."""
        left = [key for key in run.keys if key not in keys]
        self.blocks -= len(run.keys) - len(left)
        run.keys = left
        if not left:
            del self._runs[run]


class _Runs(Policy):
    """What the policies below share: an owner for every key, one or more queues of runs."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._owner: dict[bytes, Run] = {}

    def admit(self, keys: Sequence[bytes], after: bytes | None, now: float) -> int:
        return len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        gone = set(keys)
        for run in {self._owner.pop(key): None for key in keys}:
            run.queue.take(run, gone)


class Fifo(_Runs):
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


class Lru(Fifo):
    """Least recently used, by request: a chain that is used is the newest, its tail going first."""

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        keys = self._take(chain[:held])
        if keys:
            self._queue.push(keys, None)

    def add(self, keys: Sequence[bytes], after: bytes | None, now: float) -> None:
        run = self._owner.get(after) if after is not None else None
        if run is not None and run.keys[-1] == after:
            self._queue.extend(run, list(keys))
        else:
            self._queue.push(list(keys), after)

    def _take(self, keys: Sequence[bytes]) -> list[bytes]:
        """Take ``keys`` out of their runs; give those that had one, in order.

        Whoever uses a block uses its ancestors, so what is used of a run is its head: whole slices
        are compared and cut, and no block is touched by itself.
        """
        owner, queue = self._owner, self._queue
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
                queue.cut_head(run, count)
                at += count
            else:  # asked for without its ancestors
                queue.take(run, {keys[at]})
                taken.append(keys[at])
                at += 1
        return taken


class S3Fifo(_Runs):
    """S3-FIFO: a small queue on probation, a main queue, a ghost of keys that left the small one.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Counts are kept per
    block; a run moves whole when its tail earned it, since whoever used the tail used the rest.

    Args:
        capacity: blocks.
        small: share of the capacity that is on probation.
        promote: uses on probation above which a block moves to the main queue.
    """

    def __init__(self, capacity: int, small: float = 0.3, promote: int = 1) -> None:
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

    def add(self, keys: Sequence[bytes], after: bytes | None, now: float) -> None:
        ghost = self._ghost
        known = 0  # whoever was used lately was used with its ancestors: the known ones lead
        while known < len(keys) and keys[known] in ghost:
            del ghost[keys[known]]
            known += 1
        if known:
            self._main.push(list(keys[:known]), after)
            after = keys[known - 1]
        if known < len(keys):
            self._small.push(list(keys[known:]), after)

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys)
        for key in keys:
            self._uses.pop(key, None)

    def victims(self, keep: Keep) -> Iterator[bytes]:
        small, main, uses = self._small, self._main, self._uses
        spared = set[Run]()
        moved = False
        while len(small) or len(main):
            queue = small if small.blocks >= self._small_share or not len(main) else main
            run = queue.oldest()
            if run in spared:  # this queue has been gone through: try the other
                queue = main if queue is small else small
                if not len(queue) or (run := queue.oldest()) in spared:
                    if not moved:
                        return
                    spared.clear()  # some may go by now, or have come to stand behind the spared
                    moved = False
                    continue
            tail = run.keys[-1]
            if keep(tail):
                queue.rotate(run)
                spared.add(self._owner[tail])
                continue
            moved = True
            if queue is small and uses.get(tail, 0) > self._promote:
                small.drop(run)
                for key in run.keys:
                    uses.pop(key, None)
                main.push(run.keys, run.after)
            elif queue is main and uses.get(tail, 0):
                for key in run.keys:
                    if (left := uses.pop(key, 0) - 1) > 0:
                        uses[key] = left
                main.rotate(run)
            else:
                uses.pop(tail, None)
                queue.pop_tail(run)
                if queue is small:
                    self._remember(tail)
                yield tail

    def _remember(self, key: bytes) -> None:
        self._ghost[key] = None
        if len(self._ghost) > self._capacity:
            self._ghost.popitem(last=False)


POLICIES: dict[str, type[Policy]] = {"lru": Lru, "fifo": Fifo, "s3fifo": S3Fifo}
