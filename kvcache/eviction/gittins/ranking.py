"""Finds the cohort to evict from: the one with the lowest worth.

::

    queues[cls][octave]   cohorts of a class and octave that have runs to evict from, oldest first

Worth changes with age, and is never sorted as a whole. A table of worth is linear within an octave,
so the lowest worth of a queue is at one of its ends: at the oldest cohort where worth falls with
age, at the newest one where it rises. The queues are sorted by the lowest worth that a block in
them can have, and the search stops at the first queue that cannot have a lower one than the best
cohort so far.

Invariants:

* A cohort is in the queue of its class and octave if and only if it has runs that are not parked.
* The cohort found last is used until it has no runs left, an epoch ends, or a cohort that may be
  worth less enters a queue.
"""

from __future__ import annotations

from kvcache.eviction.gittins.epochs import Cohort, CohortQueue, Epoch, RankedRun
from kvcache.eviction.gittins.hazards import CLASS_COUNT, LAST, OCTAVE_COUNT, Hazards
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.eviction.policy import Policy

_INFINITE_WORTH = float("inf")

Victim = tuple[float, Cohort, bool]
"""A cohort's worth, the cohort, and whether worth rises with age there: then its newest runs are
evicted first."""


class VictimRanking(Policy):
    """Ranks cohorts by what a slot is worth to their blocks.

    Args:
        capacity: blocks that the tier can hold.
        hazards: what is learned about reuse.
        budget: how far the ranking may deviate from LRU.

    Attributes:
        hazards, budget: the arguments.
        current_epoch: the epoch of all blocks that are used or stored now.
        queues: cohorts that have runs to evict from, by class and octave.
        first_class: the first class that may have blocks.
        octaves_in_use: the number of octaves, from the first, that epochs have reached.
    """

    def __init__(self, capacity: int, hazards: Hazards, budget: LruBudget) -> None:
        self.hazards = hazards
        self.budget = budget
        self.current_epoch = Epoch(0.0)
        self.queues = [[CohortQueue() for _ in range(OCTAVE_COUNT)] for _ in range(CLASS_COUNT)]
        self.octaves_in_use = 1
        self.first_class = LAST
        # Sorted: (lowest worth that a block in the queue can have, whether worth rises with age
        # there, class, octave, queue).
        self._ranked_queues: list[tuple[float, bool, int, int, CohortQueue]] = []
        # The part of `_ranked_queues` from `_late_octave` on: it has the blocks that LRU would not
        # hold. With a `_late_octave` of -1 it is not computed.
        self._late_queues = self._ranked_queues
        self._late_octave = -1
        # The cohorts found last, by `protect_recent`, and their highest worth.
        self._victims: dict[bool, Victim | None] = {}
        self._max_victim_worth = -1.0
        self._victims_stale = True  # search again before the next eviction
        self.sort_queues()

    def worth(self, cohort: Cohort) -> float:
        """Return what a slot is worth to a block of a cohort, in reuses per second."""
        hazards, epoch, now = self.hazards, cohort.epoch, self.current_epoch
        if epoch is now:
            return hazards.tables[cohort.cls][0]
        return hazards.worth(cohort.cls, now.start_s - epoch.start_s)

    def first_victim(self, protect_recent: bool) -> Victim | None:
        """Return the cohort to evict from first; ``None`` if no cohort has runs to evict from.

        Args:
            protect_recent: evict a block that LRU would hold only if there is no other; then the
                least recently used one.
        """
        if self._victims_stale:
            self._victims.clear()
            self._max_victim_worth = -1.0
            self._victims_stale = False
        victim = self._victims.get(protect_recent)
        if victim is None or not victim[1].runs:
            victim = self._lowest_worth(protect_recent=protect_recent) or (
                self._least_recently_used() if protect_recent else None
            )
            self._victims[protect_recent] = victim
            if victim is not None:
                self._max_victim_worth = max(self._max_victim_worth, victim[0])
        return victim

    def sort_queues(self) -> None:
        """Sort the queues again: after the tables of worth change, or an octave comes into use."""
        self._ranked_queues = sorted(
            (
                (
                    min(table[octave], table[octave + 1]),
                    table[octave + 1] > table[octave],
                    cls,
                    octave,
                    queue,
                )
                for cls, (table, queues) in enumerate(
                    zip(self.hazards.tables, self.queues, strict=True)
                )
                if cls >= self.first_class
                for octave, queue in enumerate(queues[: self.octaves_in_use])
            ),
            key=lambda entry: entry[0],
        )
        self._late_octave = -1

    def _lowest_worth(self, *, protect_recent: bool) -> Victim | None:
        """Return the cohort with the lowest worth; the oldest one of several with the same worth.

        Args:
            protect_recent: among the cohorts that LRU would not hold.
        """
        worth_of, now = self.hazards.worth, self.current_epoch.start_s
        if protect_recent and self._late_octave != (octave := self.budget.edge_octave):
            self._late_octave = octave
            self._late_queues = [entry for entry in self._ranked_queues if entry[3] >= octave]
        lowest: Victim | None = None
        lowest_worth = _INFINITE_WORTH
        for bound, rising, cls, _, queue in (
            self._late_queues if protect_recent else self._ranked_queues
        ):
            if bound > lowest_worth:
                break
            if not queue:
                continue
            cohort = next(reversed(queue)) if rising else next(iter(queue))
            # If the newest cohort of a queue is recent, the oldest one stands in for the newest one
            # that is not recent: they have nearly the same age.
            if (
                protect_recent
                and cohort.epoch.recent
                and (cohort := next(iter(queue))).epoch.recent
            ):
                continue
            worth = worth_of(cls, now - cohort.epoch.start_s)
            if worth < lowest_worth or (
                worth == lowest_worth and lowest and cohort.epoch.start_s < lowest[1].epoch.start_s
            ):
                lowest_worth, lowest = worth, (worth, cohort, rising)
        return lowest

    def _least_recently_used(self) -> Victim | None:
        """Return the oldest recent cohort that has runs to evict from."""
        for epoch in self.budget.recent:
            for cohort in epoch.cohorts:
                if cohort.runs:
                    return self.worth(cohort), cohort, self._worth_rises(cohort)
        return None

    def _worth_rises(self, cohort: Cohort) -> bool:
        """Return whether the worth of a cohort's blocks rises with age in its octave."""
        table, octave = self.hazards.tables[cohort.cls], cohort.epoch.octave
        return table[octave + 1] > table[octave]

    def _enqueue(self, run: RankedRun) -> None:
        """Let ``run`` be evicted from: it begins to hold blocks, or is no longer parked."""
        cohort = run.cohort
        if not cohort.runs:
            self.queues[cohort.cls][cohort.epoch.octave][cohort] = None
            if not cohort.epoch.recent or self.worth(cohort) <= self._max_victim_worth:
                self._victims_stale = True
        cohort.runs[run] = None

    def _dequeue(self, run: RankedRun) -> None:
        """Take ``run`` out of ``runs`` or ``parked`` of its cohort."""
        cohort = run.cohort
        if run in cohort.runs:
            del cohort.runs[run]
            if not cohort.runs:
                del self.queues[cohort.cls][cohort.epoch.octave][cohort]
        else:
            del cohort.parked[run]

    def _park(self, run: RankedRun) -> None:
        """Skip ``run``, because its tail had to stay."""
        self._dequeue(run)
        run.cohort.parked[run] = None
