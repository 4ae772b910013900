"""The known blocks of the learned policy, held and evicted, and how they age.

::

    current_epoch            the epoch of all blocks that are used or stored now
    open_cohorts[cls]        its cohorts
    epochs_by_octave[octave] all other epochs by the octave of their age, oldest first

Time advances between two epochs only. An epoch ends with the first lookup after some seconds, or
after a number of blocks. Everything that depends on age is then computed once, for all lookups of
the next epoch.

Invariants:

* Every known key is in one run, and every run in one cohort. Every epoch that has known blocks is
  the current one or in the list of its octave. Runs, and past epochs, without blocks are deleted.
* A parked run stays parked until the run that continued it is evicted, its cohort reaches the next
  octave, or there is no other run to evict from.
* After a lookup, at most ``known_limit`` keys are known. Keys that are not held are forgotten in
  the order of their eviction.
* When an epoch ends, at most ``_MAX_MOVES`` epochs move to another octave. While more have to move,
  each lookup starts an epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from itertools import chain

from kvcache.eviction.gittins.epochs import Cohort, Epoch, RankedRun
from kvcache.eviction.gittins.hazards import (
    CLASS_COUNT,
    OCTAVE_COUNT,
    OCTAVE_STARTS_S,
    Hazards,
    octave_of,
)
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.eviction.gittins.ranking import VictimRanking
from kvcache.keys import Keys, common_prefix_len

# Longest epoch. Few blocks are reused within seconds, so a finer age would change little.
_EPOCH_S = 4.0
# Least number of epochs in which the tier fills once. More epochs tell more precisely which blocks
# LRU would hold: with 16, some random traffic loses 0.2 points against LRU.
_EPOCHS_PER_FILLING = 32
# An epoch has at most this many blocks, so that ages stay precise in a large tier.
_MAX_EPOCH_BLOCKS = 512
# Most epochs that move to another octave in one lookup. Bounds the time of the first lookup after a
# silence.
_MAX_MOVES = 256
# Up to the end of this octave, ~2 min, the next use of a prefetched block is still the request that
# caused the prefetch.
_PREFETCH_OCTAVE = 17
# Known keys beyond the slots: this many per slot, but not fewer than the minimum. With four per
# slot, hit ratios differ by at most 0.4 points either way, and the state is 1.7 times as large.
_HISTORY_PER_SLOT, _MIN_HISTORY = 2, 24_000
MAX_USES = 16
"""Uses of a block are counted up to this number, where the last class begins."""


class KnownRuns(VictimRanking):
    """Runs of known blocks, and the epochs in which they were last used.

    Args:
        capacity: blocks that the tier can hold.
        hazards: what is learned about reuse.
        budget: how far the ranking may deviate from LRU.
        known_limit: keys to know at most; ``None`` is about three times the capacity.

    Attributes:
        known_limit: see above.
        run_ids: the id of the run of each known key. Python's garbage collector need not visit
            integers, unlike references to runs.
        runs: runs by id.
    """

    def __init__(
        self, capacity: int, hazards: Hazards, budget: LruBudget, known_limit: int | None
    ) -> None:
        super().__init__(capacity, hazards, budget)
        if known_limit is None:
            known_limit = capacity + max(_HISTORY_PER_SLOT * capacity, _MIN_HISTORY)
        self.known_limit = known_limit
        self.run_ids: dict[bytes, int] = {}
        self.runs: dict[int, RankedRun] = {}
        self._last_run_id = 0
        # Every run that has keys to forget, the next one first. Other runs may be in it too.
        self._forget_order: OrderedDict[RankedRun, None] = OrderedDict()
        self.epochs_by_octave: list[OrderedDict[Epoch, None]] = [
            OrderedDict() for _ in range(OCTAVE_COUNT)
        ]
        self.budget.recent[self.current_epoch] = None
        self.open_cohorts: list[Cohort | None] = [None] * CLASS_COUNT  # by class
        self._epoch_blocks = max(1, min(capacity // _EPOCHS_PER_FILLING, _MAX_EPOCH_BLOCKS))
        self._epoch_end_s = 0.0  # the current epoch ends at this time,
        self._epoch_room = 0  # or after this many more blocks
        self._lookups = 0  # in the current epoch
        self._looked_up = 0  # blocks looked up in the current epoch

    # Runs

    def _append(
        self,
        run: RankedRun | None,
        keys: Keys,
        held: int,
        parent: bytes | None,
        cls: int,
        uses: int,
    ) -> RankedRun:
        """Append ``keys``, which are in no run, to ``run`` or to a new run of the current epoch.

        Args:
            run: the run before them; a new one is made if this one is of another cohort or cannot
                be continued.
            keys: the blocks.
            held: the number of leading blocks that the index holds.
            parent: the key that they continue.
            cls: their class.
            uses: their uses.

        Returns:
            the run that has them.
        """
        cohort = self.open_cohorts[cls] or self._open_cohort(cls)
        if run is None or run.cohort is not cohort or (held and run.held < len(run.keys)):
            self._last_run_id = run_id = self._last_run_id + 1
            self.runs[run_id] = run = RankedRun(run_id, keys, parent, cohort, uses)
            self._forget_order[run] = None
        else:
            run.keys += keys
            run.uses = min(run.uses, uses)
        count, run_ids, run_id = len(keys), self.run_ids, run.run_id
        for key in keys:  # faster than dict.update for the usual dozens of keys
            run_ids[key] = run_id
        self.hazards.begun[cls] += count
        cohort.blocks += count
        if held:
            self._add_held(run, held)
        return run

    def _cut(self, run: RankedRun, keys: Keys, at: int) -> tuple[Keys, int, int]:
        """Remove from ``run`` the blocks that it shares with ``keys[at:]``: they are used now.

        Returns:
            the blocks; how many leading ones the index holds; their uses, including this one.
        """
        run_keys = run.keys
        first = 0
        if run_keys[0] != keys[at]:  # looked up without the blocks before it in the run
            last = len(run_keys) - 1
            first = last if run_keys[-1] == keys[at] else run_keys.index(keys[at])
        count = common_prefix_len(run_keys, first, keys, at)
        taken = run_keys[first : first + count]
        held = max(0, min(run.held, first + count) - first)
        uses = self._count_use(run, count, held)
        run.keys = run_keys[:first] + run_keys[first + count :]
        if held:
            run.held -= held
            if not run.held:
                self._dequeue_empty(run)
        if not run.keys:
            self._delete(run)
        elif not first and not run.side:
            run.parent = taken[-1]
        return taken, held, uses

    def _count_use(self, run: RankedRun, count: int, held: int) -> int:
        """Count a use of ``count`` blocks of ``run``; the index holds ``held`` of them.

        Returns:
            their uses, including this one.
        """
        cohort = run.cohort
        octave = cohort.epoch.octave
        self.budget.take_used(cohort, held, count - held)
        if run.prefetched and octave <= _PREFETCH_OCTAVE:
            return run.uses
        self.hazards.reused[cohort.cls][octave] += count
        return min(run.uses + 1, MAX_USES)

    def _renew(self, run: RankedRun, cls: int) -> None:
        """Move all of ``run`` to the current epoch and a class; its cohort no longer counts it."""
        old, new = run.cohort, self.open_cohorts[cls] or self._open_cohort(cls)
        count = len(run.keys)
        new.blocks += count
        self.hazards.begun[cls] += count
        if old is new:
            if run in old.runs:
                del old.runs[run]
                old.runs[run] = None
            return
        if run.held:
            self._dequeue(run)
            run.cohort = new
            self._enqueue(run)
        else:
            run.cohort = new
        if not old.epoch.blocks:
            self._delete_if_empty(old.epoch)

    def _add_held(self, run: RankedRun, count: int) -> None:
        """Record that the index now holds the next ``count`` blocks of ``run``."""
        if not run.held:
            self._enqueue(run)
        run.held += count

    def _dequeue_empty(self, run: RankedRun) -> None:
        """Dequeue ``run``, which holds no block any more, and unpark the run that it continued."""
        self._dequeue(run)
        before = self._run_with(run.parent)
        if before is not None and before in before.cohort.parked:
            del before.cohort.parked[before]
            self._enqueue(before)

    def _unpark_all(self) -> None:
        for epoch in (*chain.from_iterable(self.epochs_by_octave), self.current_epoch):
            for cohort in epoch.cohorts:
                for run in cohort.parked:
                    self._enqueue(run)
                cohort.parked.clear()

    def _delete(self, run: RankedRun) -> None:
        """Delete ``run``, which has no keys any more."""
        del self.runs[run.run_id]
        self._forget_order.pop(run, None)
        self._delete_if_empty(run.cohort.epoch)

    def _run_with(self, key: bytes | None) -> RankedRun | None:
        """Return the run of a key, if it is known."""
        return None if key is None else self.runs.get(self.run_ids.get(key, 0))

    def _forget_evicted(self) -> None:
        """Forget keys that are not held until at most ``known_limit`` keys are known."""
        run_ids, order = self.run_ids, self._forget_order
        while len(run_ids) > self.known_limit and order:
            run, _ = order.popitem(last=False)
            forgotten = run.keys[run.held :]
            if not forgotten:
                continue
            for key in forgotten:
                del run_ids[key]
            run.keys = run.keys[: run.held]
            self.budget.add_blocks(run.cohort, -len(forgotten), -len(forgotten))
            if not run.keys:
                self._delete(run)

    # Epochs

    def advance(self, now: float) -> None:
        """End the current epoch if it is over."""
        if self._epoch_room <= 0 or now >= self._epoch_end_s:
            self._start_epoch(now)

    def _open_cohort(self, cls: int) -> Cohort:
        """Open the cohort of a class in the current epoch."""
        cohort = self.open_cohorts[cls] = Cohort(cls, self.current_epoch)
        self.current_epoch.cohorts.append(cohort)
        return cohort

    def _delete_if_empty(self, epoch: Epoch) -> None:
        """Delete a past epoch that has no blocks."""
        if not epoch.blocks and epoch is not self.current_epoch:
            del self.epochs_by_octave[epoch.octave][epoch]
            if epoch.recent:
                self.budget.retire(epoch)
            # A cohort refers to its epoch. Without this cycle, no garbage collection is needed.
            epoch.cohorts.clear()

    def _start_epoch(self, now: float) -> None:
        """Start an epoch at ``now``, and move older epochs to the octaves of their new age."""
        last, budget = self.current_epoch, self.budget
        self.current_epoch = Epoch(now)
        budget.recent[self.current_epoch] = None
        self.epochs_by_octave[last.octave][last] = None
        self._delete_if_empty(last)
        self.open_cohorts = [None] * CLASS_COUNT
        self._epoch_end_s, self._epoch_room = now + _EPOCH_S, self._epoch_blocks
        moves = _MAX_MOVES
        # From the oldest octave down, so that epochs which reach one octave arrive oldest first.
        for octave in range(min(self.octaves_in_use, OCTAVE_COUNT - 1) - 1, -1, -1):
            epochs, start_s = self.epochs_by_octave[octave], now - OCTAVE_STARTS_S[octave + 1]
            while epochs and (epoch := next(iter(epochs))).start_s <= start_s:
                if not moves:
                    self._epoch_end_s = now  # the rest moves with the next lookup
                    break
                moves -= 1
                self._move_epoch(epoch, octave_of(now - epoch.start_s))
        budget.end_epoch(self._looked_up)
        if self.hazards.end_epoch(now - last.start_s, self._lookups, self._looked_up):
            self.sort_queues()
        self._looked_up = self._lookups = 0
        self._victims_stale = True

    def _move_epoch(self, epoch: Epoch, octave: int) -> None:
        """Move an epoch to a later octave."""
        old_octave = epoch.octave
        if octave >= self.octaves_in_use:
            self.octaves_in_use = octave + 1
            self.sort_queues()
        del self.epochs_by_octave[old_octave][epoch]
        self.epochs_by_octave[octave][epoch] = None
        epoch.octave = octave
        for cohort in epoch.cohorts:
            if not (blocks := cohort.blocks):
                continue
            cls = cohort.cls
            # Hazards.add_at_risk(cls, old_octave + 1, octave, blocks), inlined
            arrivals = self.hazards.arrivals[cls]
            arrivals[old_octave + 1] += blocks
            arrivals[octave + 1] -= blocks
            if cohort.runs or cohort.parked:
                queues = self.queues[cls]
                queues[old_octave].pop(cohort, None)
                queues[octave][cohort] = None
                if cohort.parked:
                    cohort.runs |= cohort.parked
                    cohort.parked.clear()

    def check(self, held: Collection[bytes]) -> None:
        """Raise ``AssertionError`` if an invariant is broken, or other keys than ``held`` are held.

        For tests: takes time linear in the known keys.
        """
        past = [epoch for epochs in self.epochs_by_octave for epoch in epochs]
        epochs = [*past, self.current_epoch]
        assert len(set(epochs)) == len(epochs), "an epoch is in two octaves"
        assert all(epoch.blocks for epoch in past), "a past epoch is empty"
        assert self.current_epoch.octave == 0
        for octave, ordered in enumerate(self.epochs_by_octave):
            assert all(epoch.octave == octave < self.octaves_in_use for epoch in ordered)
            starts = [epoch.start_s for epoch in ordered]
            assert starts == sorted(starts), "epochs are out of order"
        current = sorted(self.current_epoch.cohorts, key=lambda cohort: cohort.cls)
        assert [cohort for cohort in self.open_cohorts if cohort is not None] == current

        runs = list(self.runs.values())
        assert all(self.runs[run.run_id] is run and run.keys for run in runs)
        assert all(self._run_with(key) is run for run in runs for key in run.keys)
        assert sum(len(run.keys) for run in runs) == len(self.run_ids), "a key is in two runs"
        assert sorted(key for run in runs for key in run.keys[: run.held]) == sorted(held)
        assert len(self.run_ids) <= max(self.known_limit, len(held)), "too many keys are known"
        assert all(run.held == len(run.keys) or run in self._forget_order for run in runs)
        assert set(self._forget_order) <= set(runs)

        of_cohort: dict[Cohort, list[RankedRun]] = {}
        for run in runs:
            of_cohort.setdefault(run.cohort, []).append(run)
            queued = [run in run.cohort.runs, run in run.cohort.parked]
            assert queued.count(True) == (run.held > 0), "a run is queued wrongly"
        cohorts = [cohort for epoch in epochs for cohort in epoch.cohorts]
        assert set(of_cohort) <= set(cohorts), "a run is of a deleted epoch"
        for cohort in cohorts:
            members = of_cohort.get(cohort, [])
            assert cohort.blocks == sum(len(run.keys) for run in members)
            assert set(cohort.runs) | set(cohort.parked) <= set(members)
            for octave, queue in enumerate(self.queues[cohort.cls]):
                in_queue = octave == cohort.epoch.octave and len(cohort.runs) > 0
                assert (cohort in queue) == in_queue, "a cohort is queued wrongly"
        assert sum(len(queue) for queues in self.queues for queue in queues) == sum(
            len(cohort.runs) > 0 for cohort in cohorts
        )

        recent = self.budget.recent
        assert set(recent) == {epoch for epoch in epochs if epoch.recent}
        for epoch in epochs:
            members = [run for cohort in epoch.cohorts for run in of_cohort.get(cohort, [])]
            assert epoch.blocks == sum(len(run.keys) for run in members)
            if epoch.recent:
                assert epoch.missing == sum(len(run.keys) - run.held for run in members)
        assert self.budget.recent_blocks == sum(epoch.blocks for epoch in recent)
        assert self.budget.missing == sum(epoch.missing for epoch in recent)
