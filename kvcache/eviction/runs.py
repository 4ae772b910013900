"""The base of the policies that keep their blocks in queues of runs (``run_queue``).

Invariants: every key of a policy is in exactly one run. If the tail of a run cannot be evicted
because a run of the same queue continues it, the run moves right behind that one, so a side block
that was stored after its chain does not make the chain newer than other chains. If it cannot be
evicted for another reason, the run is in use and moves to the newest end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence

from kvcache.eviction.policy import Policy, Take
from kvcache.eviction.run_queue import ChainRun, RunQueue, RunTable


class RunPolicy(Policy):
    """Base of the policies that keep their blocks in one or more queues of runs.

    Attributes:
        runs: its runs.
        run_of: the run of each held key.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.runs = RunTable()
        self.run_of = self.runs.run_of

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
            if (found := self._oldest_run(kept_runs)) is None:
                if not progress:
                    return
                # Evicting other runs may have freed a kept tail, or moved runs behind a kept one.
                kept_runs.clear()
                progress = False
                continue
            queue, run = found
            offer = self._offer_size(queue, run, count)
            if not offer:
                progress = True
                continue
            offered, parent = run.keys[-offer:], run.parent
            if taken := take(offered):
                progress = True
                count -= taken
                self._evicted(queue, queue.cut_tail(run, taken))
                if not run.keys and parent is not None:
                    kept_runs.discard(self.run_of.get(parent, run))
            if taken < len(offered):
                kept_runs.add(queue.keep(run))

    def _oldest_run(self, kept: set[ChainRun]) -> tuple[RunQueue, ChainRun] | None:
        """Return the oldest run, of the first queue that has one, that is not in ``kept``.

        The runs of ``kept`` that are older become the newest.
        """
        for queue in self._queues_to_evict():
            for _ in range(len(queue)):
                if (run := queue.oldest()) not in kept:
                    return queue, run
                kept.add(queue.rotate(run))
        return None

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
