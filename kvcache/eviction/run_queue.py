"""Runs, and queues of runs: the unit in which the baseline policies order blocks.

A *run* is consecutive blocks of one chain, head first::

    queue   oldest                         newest
            [a0 a1 a2]   [b0 b1]   [a3 a4 a5]
                    ^                        a run is evicted from its tail

Invariant: a run is consecutive blocks of one chain, or side blocks that were used together.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet


class ChainRun:
    """Consecutive blocks of one chain.

    Attributes:
        queue: the queue that this run is in.
        keys: the blocks, head first.
        parent: the key that the first block continues, if known.
        older, newer: the neighbours in the queue; at its ends, ``queue.ends``.
    """

    __slots__ = ("keys", "newer", "older", "parent", "queue")
    __deletable__ = ("newer", "older")  # mypyc asks for it

    def __init__(self, queue: RunQueue, keys: list[bytes], parent: bytes | None) -> None:
        self.queue = queue
        self.keys = keys
        self.parent = parent
        self.older = self.newer = self


class RunQueue:
    """Runs from oldest to newest.

    Args:
        runs: the runs of each key and of each parent, shared by all queues of a policy.

    Attributes:
        ends: stands before the oldest run and behind the newest one; it has no keys.
        blocks: blocks in all runs of this queue.
    """

    def __init__(self, runs: RunTable) -> None:
        self._run_of = runs.run_of
        self._continuation_of = runs.continuation_of
        self.ends = ChainRun(self, [], None)
        self._count = 0
        self.blocks = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ChainRun]:
        run = self.ends.newer
        while run is not self.ends:
            yield run
            run = run.newer

    def oldest(self) -> ChainRun:
        return self.ends.newer

    def push(self, keys: list[bytes], parent: bytes | None) -> None:
        """Make ``keys`` the newest; they are appended to the newest run if they continue it."""
        run = self.ends.older
        if parent is not None and run.keys and run.keys[-1] == parent:
            run.keys += keys
        else:
            run = ChainRun(self, keys, parent)
            self._link(run, self.ends)
            self._count += 1
            if parent is not None:
                self._continuation_of[parent] = run
        run_of = self._run_of
        for key in keys:
            run_of[key] = run
        self.blocks += len(keys)

    def push_renewed(self, keys: list[bytes], parent: bytes | None) -> None:
        """Make ``keys`` the newest, together with the run that they continue, if there is one."""
        run = self._run_of.get(parent) if parent is not None else None
        if run is None or run.keys[-1] != parent:
            self.push(keys, parent)
            return
        run.keys += keys
        self._move(run, self.ends)
        run_of = self._run_of
        for key in keys:
            run_of[key] = run
        self.blocks += len(keys)

    def drop(self, run: ChainRun) -> None:
        """Take ``run`` out of the queue; the caller moves or forgets its keys."""
        run.older.newer, run.newer.older = run.newer, run.older
        del run.older, run.newer  # no cycle is left for the garbage collector
        self._count -= 1
        self.blocks -= len(run.keys)
        if run.parent is not None and self._continuation_of.get(run.parent) is run:
            del self._continuation_of[run.parent]

    def keep(self, run: ChainRun) -> ChainRun:
        """Move the oldest run: its tail has to stay.

        It moves right behind the run that continues it, if that is in this queue: the two were
        used at the same time. Otherwise it becomes the newest.

        Returns:
            the run that has the tail now.
        """
        continuation = self._continuation_of.get(run.keys[-1])
        if continuation is not None and continuation.queue is self:
            return self._move_merged(run, continuation.newer)
        return self._move_merged(run, self.ends)

    def rotate(self, run: ChainRun) -> ChainRun:
        """Make ``run`` the newest; returns the run that has its tail now."""
        return self._move_merged(run, self.ends)

    def _move_merged(self, run: ChainRun, newer: ChainRun) -> ChainRun:
        """Move ``run`` before ``newer``, merged into the run of this queue that it continues.

        Without the merge, chains that grew one block at a time, in turns, would stay many runs of
        one block, and each eviction would visit all of them.
        """
        head = self._run_of.get(run.parent) if run.parent is not None else None
        if (
            head is None
            or head is run  # it continues itself, in a chain that no hash makes
            or head.queue is not self
            or head.keys[-1] != run.parent
            or head.newer is newer
        ):
            self._move(run, newer)
            return run
        self.drop(run)
        self._move(head, newer)
        head.keys += run.keys
        run_of = self._run_of
        for key in run.keys:
            run_of[key] = head
        self.blocks += len(run.keys)
        return head

    def _link(self, run: ChainRun, newer: ChainRun) -> None:
        older = newer.older
        run.older, run.newer = older, newer
        older.newer = newer.older = run

    def _move(self, run: ChainRun, newer: ChainRun) -> None:
        if newer is not run:
            run.older.newer, run.newer.older = run.newer, run.older
            self._link(run, newer)

    def cut_tail(self, run: ChainRun, count: int) -> list[bytes]:
        """Forget the last ``count`` keys of ``run``; returns them, head first."""
        keys, run_of = run.keys[-count:], self._run_of
        del run.keys[-count:]
        for key in keys:
            del run_of[key]
        self.blocks -= count
        if not run.keys:
            self.drop(run)
        return keys

    def cut_head(self, run: ChainRun, count: int) -> None:
        """Take the first ``count`` keys out of ``run``; the caller updates ``run_of``."""
        if count == len(run.keys):
            self.drop(run)
            return
        self.blocks -= count
        continuation_of = self._continuation_of
        if run.parent is not None and continuation_of.get(run.parent) is run:
            del continuation_of[run.parent]
        run.parent = run.keys[count - 1]
        continuation_of[run.parent] = run
        del run.keys[:count]

    def cut_out(self, run: ChainRun, keys: AbstractSet[bytes]) -> None:
        """Take ``keys`` out of ``run``, wherever they are in it; takes time linear in the run."""
        remaining = [key for key in run.keys if key not in keys]
        self.blocks -= len(run.keys) - len(remaining)
        run.keys = remaining
        if not remaining:
            self.drop(run)

    def check(self) -> set[bytes]:
        """Raise ``AssertionError`` if an invariant is broken; returns the keys of this queue."""
        runs = list(self)
        keys = [key for run in runs for key in run.keys]
        assert self._count == len(runs), "runs are miscounted"
        assert self.blocks == len(keys), "blocks are miscounted"
        assert all(run.queue is self and run.keys for run in runs)
        assert all(run.newer.older is run for run in (*runs, self.ends))
        assert all(self._run_of[key] is run for run in runs for key in run.keys)
        return set(keys)


class RunTable:
    """The runs of a policy.

    Attributes:
        run_of: the run of each held key.
        continuation_of: for a key that runs continue, the one of them that was made last.
    """

    def __init__(self) -> None:
        self.run_of: dict[bytes, ChainRun] = {}
        self.continuation_of: dict[bytes, ChainRun] = {}
