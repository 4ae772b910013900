"""Cohorts by class and age, of blocks that are held and of blocks that have left.

::

    _epoch                 the one that is now, and _open[kind] its cohorts, that runs of now join
    _lines[octave]         all other epochs whose age is in an octave, the oldest first
    _queues[kind][octave]  the cohorts that have runs to ask, by class: here victims are found

Time passes between two epochs only. An epoch ends with the first look-up after some seconds, or
after some blocks; what follows from age is done then, once for all look-ups of the next one.

Always true here:

* Every known key is in one run, every run in one cohort, every epoch that knows a block is that of
  now or in the line of its octave, and a cohort with runs that are not parked is in its queue.
* A run is parked when its tail was kept, until what continued it has left, or its cohort comes to
  the next octave, or there is nobody else to ask.
* No more keys are known than ``_limit`` after a look-up; those not held are forgotten first, the
  first to leave first. A run or an epoch without keys is nowhere.
* No more than ``_MOVES`` epochs move to another octave at once; while some are late, each look-up
  begins an epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain

from kvcache.eviction.gittins.epochs import Cohort, Epoch, Line, RankedRun
from kvcache.eviction.gittins.hazards import CLASSES, OCTAVES, STARTS, Hazards, octave_of
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.eviction.policy import Policy
from kvcache.keys import Keys, common_prefix_len

_PARTS, _MOST = 32, 512  # an epoch is for as many blocks as there are slots; and blocks of one
_SPAN_S = 4.0  # that an epoch takes
_MOVES = 256
_TOLD = 17  # octave, of two minutes, up to which what came back is asked for by who had it come
MANY = 16  # uses, and more are not counted
_NEVER = float("inf")

_First = tuple[float, Cohort, bool]
"""A cohort, after what it is worth; and whether it is worth more as it grows older: its newest runs
go first then."""


class RankedRuns(Policy):
    """What a policy knows that ranks blocks by their class and age."""

    def __init__(self, capacity: int, known_limit: int | None = None) -> None:
        self._limit = known_limit or capacity + max(2 * capacity, 24_000)
        self._hazards = Hazards(capacity)
        self._trust = LruBudget(capacity)
        self._run_of: dict[bytes, int] = {}  # the number of the run that a known key is in
        self._runs: dict[int, RankedRun] = {}
        self._made = 0  # runs, since the start: their numbers
        self._lines: list[OrderedDict[Epoch, None]] = [OrderedDict() for _ in range(OCTAVES)]
        self._queues = [[Line() for _ in range(OCTAVES)] for _ in range(CLASSES)]
        self._past: OrderedDict[RankedRun, None] = (
            OrderedDict()
        )  # all with keys not held, and others
        self._epoch = Epoch(0.0)
        self._trust.recent[self._epoch] = None
        self._open: list[Cohort | None] = [None] * CLASSES
        self._until = 0.0  # the epoch lasts,
        self._room = 0  # or for so many more blocks
        self._enough = max(1, min(capacity // _PARTS, _MOST))
        self._lookups = 0  # in this epoch
        self._asked = 0  # blocks, by them
        self._order: list[tuple[float, bool, int, int, Line]] = []
        self._oldest = 1  # octave that no epoch has come to yet
        self._before = self._order  # those of them in which LRU would not hold everything,
        self._since = -1  # from this octave on
        self._stirred = True  # who goes first has to be found; else it was,
        self._found: dict[bool, _First | None] = {}  # of all or of what is spare,
        self._most = -1.0  # and is worth no more than this
        self._sort()

    # What a run has

    def _join(
        self,
        run: RankedRun | None,
        keys: Keys,
        held: int,
        parent: bytes | None,
        kind: int,
        uses: int,
    ) -> RankedRun:
        """Put ``keys``, the first ``held`` of them held, at the end of ``run`` or of a new one."""
        cohort = self._open[kind] or self._begin(kind)
        if run is None or run.cohort is not cohort or (held and run.held < len(run.keys)):
            self._made = number = self._made + 1
            self._runs[number] = run = RankedRun(number, keys, parent, cohort, uses)
            self._past[run] = None
        else:
            run.keys += keys
            run.uses = min(run.uses, uses)
        count, run_of, number = len(keys), self._run_of, run.number
        for key in keys:  # faster than an update with a dict of them
            run_of[key] = number
        self._hazards.begun[kind] += count
        cohort.blocks += count
        if held:
            self._hold(run, held)
        return run

    def _cut(self, run: RankedRun, keys: Keys, at: int) -> tuple[Keys, int, int]:
        """Take out of ``run`` what ``keys`` have from ``at`` on, since it is used now.

        Returns:
            what was taken; how many of these, the leading ones, are held; and their uses.
        """
        ours = run.keys
        first = 0
        if ours[0] != keys[at]:  # it is asked for without what it continues
            first = len(ours) - 1 if ours[-1] == keys[at] else ours.index(keys[at])
        count = common_prefix_len(ours, first, keys, at)
        taken = ours[first : first + count]
        held = max(0, min(run.held, first + count) - first)
        uses = self._used(run, count, held)
        run.keys = ours[:first] + ours[first + count :]
        if held:
            run.held -= held
            if not run.held:
                self._leave(run)
        if not run.keys:
            self._end(run)
        elif not first:
            run.parent = taken[-1]
        return taken, held, uses

    def _used(self, run: RankedRun, count: int, held: int) -> int:
        """So many blocks of ``run`` are used now, so many of them held; how often that makes it."""
        cohort = run.cohort
        octave = cohort.epoch.octave
        self._trust.used(cohort, held, count - held)
        if run.told and octave <= _TOLD:
            return run.uses
        self._hazards.used[cohort.kind][octave] += count
        return min(run.uses + 1, MANY)

    def _restart(self, run: RankedRun, kind: int) -> None:
        """All of ``run``, which its cohort does not count any more, is of this class and of now."""
        old, new = run.cohort, self._open[kind] or self._begin(kind)
        count = len(run.keys)
        new.blocks += count
        self._hazards.begun[kind] += count
        if old is new:
            if run in old.runs:
                del old.runs[run]
                old.runs[run] = None
            return
        if run.held:
            self._off(run)
            run.cohort = new
            self._enter(run)
        else:
            run.cohort = new
        if not old.epoch.blocks:
            self._bury(old.epoch)

    def _hold(self, run: RankedRun, count: int) -> None:
        """The next ``count`` blocks of ``run`` are in the index from now on."""
        if not run.held:
            self._enter(run)
        run.held += count

    def _end(self, run: RankedRun) -> None:
        """``run`` has no keys any more."""
        del self._runs[run.number]
        self._past.pop(run, None)
        self._bury(run.cohort.epoch)

    def _find(self, key: bytes | None) -> RankedRun | None:
        """The run that a key is in."""
        return None if key is None else self._runs.get(self._run_of.get(key, 0))

    def _forget(self) -> None:
        """Forget keys that are not held, the first to leave first, until few enough are known."""
        run_of, past = self._run_of, self._past
        while len(run_of) > self._limit and past:
            run, _ = past.popitem(last=False)
            gone = run.keys[run.held :]
            if not gone:
                continue
            for key in gone:
                del run_of[key]
            run.keys = run.keys[: run.held]
            self._trust.count(run.cohort, -len(gone), -len(gone))
            if not run.keys:
                self._end(run)

    # Where it is found

    def _enter(self, run: RankedRun) -> None:
        cohort = run.cohort
        if not cohort.runs:
            self._queues[cohort.kind][cohort.epoch.octave][cohort] = None
            if not cohort.epoch.recent or self._worth(cohort) <= self._most:
                self._stirred = True
        cohort.runs[run] = None

    def _off(self, run: RankedRun) -> None:
        """``run`` is not found where it is."""
        cohort = run.cohort
        if run in cohort.runs:
            del cohort.runs[run]
            if not cohort.runs:
                del self._queues[cohort.kind][cohort.epoch.octave][cohort]
        else:
            del cohort.parked[run]

    def _leave(self, run: RankedRun) -> None:
        """``run`` holds nothing any more: what it continued may be a tail now."""
        self._off(run)
        before = self._find(run.parent)
        if before is not None and before in before.cohort.parked:
            del before.cohort.parked[before]
            self._enter(before)

    def _park(self, run: RankedRun) -> None:
        self._off(run)
        run.cohort.parked[run] = None

    def _unpark_all(self) -> None:
        """Ask all that are parked again."""
        for epoch in (*chain.from_iterable(self._lines), self._epoch):
            for cohort in epoch.cohorts:
                for run in cohort.parked:
                    self._enter(run)
                cohort.parked.clear()

    # How old it is

    def _begin(self, kind: int) -> Cohort:
        """The cohort that runs of this class join from now on."""
        cohort = self._open[kind] = Cohort(kind, self._epoch)
        self._epoch.cohorts.append(cohort)
        return cohort

    def _bury(self, epoch: Epoch) -> None:
        """Have nothing to do with an epoch that has no blocks, and will have none."""
        if not epoch.blocks and epoch is not self._epoch:
            del self._lines[epoch.octave][epoch]
            if epoch.recent:
                self._trust.forget(epoch)
            epoch.cohorts.clear()  # which know it: nothing is left to Python's garbage collector

    def _tick(self, now: float) -> None:
        """Begin another epoch, when it is time for it."""
        if self._room <= 0 or now >= self._until:
            self._pass(now)

    def _pass(self, now: float) -> None:
        """Have the time be ``now``, for all that is known."""
        last, trust = self._epoch, self._trust
        self._epoch = Epoch(now)
        trust.recent[self._epoch] = None
        self._lines[last.octave][last] = None
        self._bury(last)
        self._open = [None] * CLASSES
        self._until, self._room = now + _SPAN_S, self._enough
        moves = _MOVES
        # The oldest first, so that those that come to one octave together come in their order.
        for octave in range(min(self._oldest, OCTAVES - 1) - 1, -1, -1):
            line, begun = self._lines[octave], now - STARTS[octave + 1]
            while line and (epoch := next(iter(line))).time <= begun:
                if not moves:
                    self._until = now
                    break
                moves -= 1
                self._age(epoch, octave_of(now - epoch.time))
        trust.passed(self._asked)
        if self._hazards.passed(now - last.time, self._lookups, self._asked):
            self._sort()
        self._asked = self._lookups = 0
        self._stirred = True

    def _age(self, epoch: Epoch, older: int) -> None:
        """Move an epoch to a later octave."""
        octave = epoch.octave
        if older >= self._oldest:
            self._oldest = older + 1
            self._sort()
        del self._lines[octave][epoch]
        self._lines[older][epoch] = None
        epoch.octave = older
        for cohort in epoch.cohorts:
            if not (blocks := cohort.blocks):
                continue
            kind = cohort.kind
            came = self._hazards.came[kind]
            came[octave + 1] += blocks
            came[older + 1] -= blocks
            if cohort.runs or cohort.parked:
                queues = self._queues[kind]
                queues[octave].pop(cohort, None)
                queues[older][cohort] = None
                if cohort.parked:
                    cohort.runs |= cohort.parked
                    cohort.parked.clear()

    # What it is worth

    def _sort(self) -> None:
        """Sort the queues by the least that a block in them can be worth."""
        self._order = sorted(
            (
                (
                    min(table[octave], table[octave + 1]),
                    table[octave + 1] > table[octave],
                    kind,
                    octave,
                    line,
                )
                for kind, (table, lines) in enumerate(
                    zip(self._hazards.tables, self._queues, strict=True)
                )
                for octave, line in enumerate(lines[: self._oldest])
            ),
            key=lambda entry: entry[0],
        )
        self._since = -1

    def _lowest(self, *, spare: bool) -> _First | None:
        """The cohort that is worth least, of those that have runs to ask.

        Args:
            spare: of those that LRU would not hold.
        """
        worth_of, now = self._hazards.worth, self._epoch.time
        if spare and self._since != (since := self._trust.edge_octave):
            self._since = since
            self._before = [entry for entry in self._order if entry[3] >= since]
        lowest: _First | None = None
        least = _NEVER
        for bound, rising, kind, _, line in self._before if spare else self._order:
            if bound > least:
                break
            if not line:
                continue
            cohort = next(reversed(line)) if rising else next(iter(line))
            # The oldest of a line is about as old as the newest of it that LRU would not hold.
            if spare and cohort.epoch.recent and (cohort := next(iter(line))).epoch.recent:
                continue
            worth = worth_of(kind, now - cohort.epoch.time)
            if worth < least or (
                worth == least and lowest and cohort.epoch.time < lowest[1].epoch.time
            ):
                least, lowest = worth, (worth, cohort, rising)
        return lowest

    def _least_recent(self) -> _First | None:
        """The cohort that was used first, of those that LRU would hold and have runs to ask."""
        for epoch in self._trust.recent:
            for cohort in epoch.cohorts:
                if cohort.runs:
                    return self._worth(cohort), cohort, self._rising(cohort)
        return None

    def _first(self, spare: bool) -> _First | None:
        """The cohort that goes first.

        Args:
            spare: what LRU would hold is to stay, as far as that goes.
        """
        if self._stirred:
            self._found.clear()
            self._most = -1.0
            self._stirred = False
        found = self._found.get(spare)
        if found is None or not found[1].runs:
            found = self._lowest(spare=spare) or (self._least_recent() if spare else None)
            self._found[spare] = found
            if found is not None:
                self._most = max(self._most, found[0])
        return found

    def _worth(self, cohort: Cohort) -> float:
        """What a slot is worth to a block of a cohort."""
        hazards, epoch, now = self._hazards, cohort.epoch, self._epoch
        if epoch is now:
            return hazards.tables[cohort.kind][0]
        return hazards.worth(cohort.kind, now.time - epoch.time)

    def _rising(self, cohort: Cohort) -> bool:
        """Whether blocks of a cohort are worth more as they grow older."""
        table, octave = self._hazards.tables[cohort.kind], cohort.epoch.octave
        return table[octave + 1] > table[octave]
