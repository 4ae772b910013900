"""Runs, and queues of runs: the unit in which the baseline policies order blocks.

A *run* is consecutive blocks of one chain, head first::

    queue   oldest                         newest
            [a0 a1 a2]   [b0 b1]   [a3 a4 a5]
                    ^                        a run is evicted from its tail

Invariants: every key of a policy is in exactly one run; a run is consecutive blocks of one chain.
If the tail of a run cannot be evicted, the run is in use and moves to the newest end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

from kvcache.eviction.policy import Policy, Take


class ChainRun:
    """Consecutive blocks of one chain.

    Attributes:
        queue: the queue that this run is in.
        keys: the blocks, head first.
        parent: the key that the first block continues, if known.
    """

    __slots__ = ("keys", "parent", "queue")

    def __init__(self, queue: RunQueue, keys: list[bytes], parent: bytes | None) -> None:
        self.queue = queue
        self.keys = keys
        self.parent = parent


class RunQueue:
    """Runs from oldest to newest.

    Args:
        run_of: the run of each key, shared by all queues of a policy.

    Attributes:
        blocks: blocks in all runs of this queue.
    """

    def __init__(self, run_of: dict[bytes, ChainRun]) -> None:
        self._run_of = run_of
        self._runs: OrderedDict[ChainRun, None] = OrderedDict()
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._runs)

    def oldest(self) -> ChainRun:
        return next(iter(self._runs))

    def newest(self) -> ChainRun:
        return next(reversed(self._runs))

    def push(self, keys: list[bytes], parent: bytes | None) -> None:
        """Make ``keys`` the newest; they are appended to the newest run if they continue it."""
        run = self.newest() if self._runs else None
        if run is not None and run.keys[-1] == parent:
            run.keys += keys
        else:
            run = ChainRun(self, keys, parent)
            self._runs[run] = None
        run_of = self._run_of
        for key in keys:
            run_of[key] = run
        self.blocks += len(keys)

    def extend(self, run: ChainRun, keys: list[bytes]) -> None:
        """Append ``keys``, which continue ``run``, to it, and make ``run`` the newest."""
        run.keys += keys
        self._runs.move_to_end(run)
        run_of = self._run_of
        for key in keys:
            run_of[key] = run
        self.blocks += len(keys)

    def drop(self, run: ChainRun) -> None:
        """Take ``run`` out of the queue; the caller moves or forgets its keys."""
        del self._runs[run]
        self.blocks -= len(run.keys)

    def rotate(self, run: ChainRun) -> None:
        """Make ``run`` the newest, merged into the run that it continues if that is in the queue.

        Without the merge, chains that grew one block at a time, in turns, would stay many runs of
        one block, and each eviction would visit all of them.
        """
        head = self._run_of.get(run.parent) if run.parent is not None else None
        if head is not None and head.queue is self and head.keys[-1] == run.parent:
            self.drop(run)
            self.extend(head, run.keys)
        else:
            self._runs.move_to_end(run)

    def cut_tail(self, run: ChainRun, count: int) -> list[bytes]:
        """Forget the last ``count`` keys of ``run``; returns them, head first."""
        keys, run_of = run.keys[-count:], self._run_of
        del run.keys[-count:]
        for key in keys:
            del run_of[key]
        self.blocks -= count
        if not run.keys:
            del self._runs[run]
        return keys

    def cut_head(self, run: ChainRun, count: int) -> None:
        """Take the first ``count`` keys out of ``run``; the caller updates ``run_of``."""
        self.blocks -= count
        if count == len(run.keys):
            del self._runs[run]
        else:
            run.parent = run.keys[count - 1]
            del run.keys[:count]

    def cut_out(self, run: ChainRun, keys: AbstractSet[bytes]) -> None:
        """Take ``keys`` out of ``run``, wherever they are in it; takes time linear in the run."""
        remaining = [key for key in run.keys if key not in keys]
        self.blocks -= len(run.keys) - len(remaining)
        run.keys = remaining
        if not remaining:
            del self._runs[run]

    def check(self) -> set[bytes]:
        """Raise ``AssertionError`` if an invariant is broken; returns the keys of this queue."""
        keys = [key for run in self._runs for key in run.keys]
        assert self.blocks == len(keys), "blocks are miscounted"
        assert all(run.queue is self and run.keys for run in self._runs)
        assert all(self._run_of[key] is run for run in self._runs for key in run.keys)
        return set(keys)


class RunPolicy(Policy):
    """Base of the policies that keep their blocks in one or more queues of runs.

    Attributes:
        run_of: the run of each held key.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.run_of: dict[bytes, ChainRun] = {}

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        return len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        removed = set(keys)
        for run in {self.run_of.pop(key): None for key in keys}:
            run.queue.cut_out(run, removed)

    def evict(self, count: int, take: Take) -> None:
        kept_runs = set[ChainRun]()  # runs that kept their tail in this pass
        progress = False
        while count:
            for queue in self._queues_to_evict():
                if len(queue) and (run := queue.oldest()) not in kept_runs:
                    break
            else:
                if not progress:
                    return
                # Evicting other runs may have freed a kept tail, or moved runs behind a kept one.
                kept_runs.clear()
                progress = False
                continue
            offer = self._offer_size(queue, run, count)
            if not offer:
                progress = True
                continue
            offered = run.keys[-offer:]
            if taken := take(offered):
                progress = True
                count -= taken
                self._evicted(queue, queue.cut_tail(run, taken))
            if taken < len(offered):
                tail = run.keys[-1]
                queue.rotate(run)
                kept_runs.add(self.run_of[tail])

    def check(self, held: Collection[bytes]) -> None:
        """Raise ``AssertionError`` if an invariant is broken, or the keys are not ``held``.

        For tests: takes time linear in the blocks.
        """
        queues = self._queues_to_evict()
        keys = [queue.check() for queue in queues]
        assert sum(queue.blocks for queue in queues) == len(self.run_of)
        assert set[bytes]().union(*keys) == set(self.run_of) == set(held)

    @abstractmethod
    def _queues_to_evict(self) -> Sequence[RunQueue]:
        """All queues, best first; a later one is used only while every tail before it must stay."""

    def _offer_size(self, queue: RunQueue, run: ChainRun, count: int) -> int:
        """Return how many blocks of ``run``, at most ``count``, may be evicted now.

        0 means that this method moved the run elsewhere instead.
        """
        return min(len(run.keys), count)

    def _evicted(self, queue: RunQueue, keys: list[bytes]) -> None:
        """Record that ``keys``, head first, were evicted from a run of ``queue``."""

    def _cut_out(self, keys: Sequence[bytes]) -> list[bytes]:
        """Take ``keys`` out of their runs; returns those that were in one, in order.

        A request that uses a block also uses its ancestors, so the used part of a run is normally
        its head: this compares and cuts whole slices, and does no work for single blocks.
        """
        run_of = self.run_of
        found: list[bytes] = []
        at = 0
        while at < len(keys):
            run = run_of.get(keys[at])
            if run is None:
                at += 1
                continue
            count = min(len(run.keys), len(keys) - at)
            if run.keys[:count] != list(keys[at : at + count]):
                pairs = zip(run.keys, keys[at : at + count], strict=False)
                count = next(i for i, (in_run, asked) in enumerate(pairs) if in_run != asked)
            if count:
                found += run.keys[:count]
                run.queue.cut_head(run, count)
                at += count
            else:  # the block was looked up without the blocks before it in its run
                run.queue.cut_out(run, {keys[at]})
                found.append(keys[at])
                at += 1
        return found
