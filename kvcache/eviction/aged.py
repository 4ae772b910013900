"""Cohorts by class and age, of blocks that are held and of blocks that have left.

::

    _open[kind]            the cohort that runs of now join, for some seconds or some blocks
    _lines[octave]         all others whose age is in an octave, the oldest first
    _queues[kind][octave]  those that have runs to ask, by class: here victims are found

Always true here:

* Every known key is in one run, every run in one cohort, every cohort that knows a block open or in
  the line of its octave, and if it has runs that are not parked in its queue.
* A run is parked when its tail was kept, until what continued it has left, or its cohort comes to
  the next octave, or there is nobody else to ask.
* No more keys are known than ``_limit``; those not held are forgotten first, the first to leave
  first. A run or a cohort without keys is nowhere.
* A call moves no more than ``_MOVES`` cohorts to another octave; what is late moves at the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvcache.eviction.cohorts import Cohort, Line, Run, alike
from kvcache.eviction.hazards import CLASSES, OCTAVES, STARTS, Hazards, octave_of
from kvcache.eviction.policy import Policy
from kvcache.eviction.trust import Trust

_PARTS, _MOST = 32, 512  # cohorts of as many blocks as there are slots; and blocks of one
_SPAN_S = 4.0  # that a cohort is open for
_MOVES = 256
_TOLD = 17  # octave, of two minutes, up to which what came back is asked for by who had it come
_NEVER = float("inf")


class AgedRuns(Policy):
    """What a policy knows that ranks blocks by their class and age."""

    def __init__(self, capacity: int) -> None:
        self._limit = capacity + max(4 * capacity, 24_000)
        self._hazards = Hazards(capacity)
        self._trust = Trust(capacity)
        self._runs: dict[bytes, Run] = {}  # of every known key
        self._lines = [Line() for _ in range(OCTAVES)]
        self._queues = [[Line() for _ in range(OCTAVES)] for _ in range(CLASSES)]
        self._past: OrderedDict[Run, None] = OrderedDict()  # all with keys not held, and others
        self._open: list[Cohort | None] = [None] * CLASSES
        self._opened = 0.0  # the first of them
        self._joined = 0  # blocks, since then
        self._enough = max(1, min(capacity // _PARTS, _MOST))
        self._order: list[tuple[float, bool, int, int, Line]] = []
        self._before = self._order  # those of them in which LRU would not hold everything,
        self._since = -1  # from this octave on
        self._stirred = False  # what was parked may be worth less than what is looked at
        self._now = 0.0
        self._dues = [_NEVER] * OCTAVES  # when a cohort leaves its octave, or before that
        self._oldest = 1  # octave that no cohort has come to yet
        self._sort()

    # What a run has

    def _join(
        self,
        run: Run | None,
        keys: list[bytes],
        held: int,
        after: bytes | None,
        kind: int,
        uses: int,
    ) -> Run:
        """Put ``keys``, the first ``held`` of them held, at the end of ``run`` or of a new one."""
        cohort = self._open[kind] or self._begin(kind)
        if run is None or run.cohort is not cohort or (held and run.held < len(run.keys)):
            run = Run(after, cohort, uses)
            self._past[run] = None
        elif uses < run.uses:
            run.uses = uses
        count = len(keys)
        run.keys += keys
        self._runs.update(dict.fromkeys(keys, run))
        self._hazards.at_risk(kind, 0, 0, count)
        self._joined += count
        self._trust.count(cohort, count, count)
        if held:
            self._hold(run, held)
        return run

    def _cut(self, run: Run, keys: Sequence[bytes], at: int) -> tuple[list[bytes], int, int]:
        """Take out of ``run`` what ``keys`` have from ``at`` on, since it is used now.

        Returns:
            what was taken; how many of these, the leading ones, are held; and their uses.
        """
        ours = run.keys
        first = 0
        if ours[0] != keys[at]:  # it is asked for without what it continues
            first = len(ours) - 1 if ours[-1] == keys[at] else ours.index(keys[at])
        count = alike(ours, first, keys, at)
        taken = ours[first : first + count]
        held = max(0, min(run.held, first + count) - first)
        uses = self._used(run, count, held)
        cohort = run.cohort
        del ours[first : first + count]
        self._trust.count(cohort, -count, held - count)
        if held:
            run.held -= held
            if not run.held:
                self._leave(run)
        if not ours:
            self._past.pop(run, None)
            self._bury(cohort)
        elif not first:
            run.after = taken[-1]
        return taken, held, uses

    def _used(self, run: Run, count: int, held: int) -> int:
        """So many blocks of ``run`` are used now; how often that makes it."""
        cohort = run.cohort
        self._trust.used(cohort, held, count - held)
        octave = max(cohort.octave, octave_of(self._now - cohort.time))
        if run.told and octave <= _TOLD:
            return run.uses
        if octave > cohort.octave:
            self._hazards.at_risk(cohort.kind, cohort.octave + 1, octave, count)
        self._hazards.used(cohort.kind, octave, count)
        return run.uses + 1

    def _again(self, run: Run, after: bytes | None, kind: int, uses: int) -> None:
        """All of ``run`` is used now: it is a new one, of another class perhaps."""
        self._hazards.at_risk(kind, 0, 0, len(run.keys))
        run.uses, run.after = uses, after
        run.awaited, run.told, run.ends = True, False, False
        self._past[run] = None
        self._past.move_to_end(run)
        self._restart(run, kind)

    def _hold(self, run: Run, count: int) -> None:
        """The next ``count`` blocks of ``run`` are in the index from now on."""
        if not run.held:
            self._enter(run)
        run.held += count
        self._trust.count(run.cohort, 0, -count)

    def _forget(self) -> None:
        """Forget keys that are not held, the first to leave first, until few enough are known."""
        runs, past = self._runs, self._past
        while len(runs) > self._limit and past:
            run, _ = past.popitem(last=False)
            gone = run.keys[run.held :]
            for key in gone:
                del runs[key]
            del run.keys[run.held :]
            self._trust.count(run.cohort, -len(gone), -len(gone))
            self._bury(run.cohort)

    # Where it is found

    def _enter(self, run: Run) -> None:
        cohort = run.cohort
        if not cohort.runs:
            self._queues[cohort.kind][cohort.octave][cohort] = None
        cohort.runs[run] = None

    def _off(self, run: Run) -> None:
        """``run`` is not found where it is."""
        cohort = run.cohort
        if run in cohort.runs:
            del cohort.runs[run]
            if not cohort.runs:
                del self._queues[cohort.kind][cohort.octave][cohort]
        else:
            del cohort.parked[run]

    def _leave(self, run: Run) -> None:
        """``run`` holds nothing any more: what it continued may be a tail now."""
        self._off(run)
        if run.after is not None:
            before = self._runs.get(run.after)
            if before is not None and before in before.cohort.parked:
                del before.cohort.parked[before]
                self._enter(before)
                self._stirred = True

    def _park(self, run: Run) -> None:
        self._off(run)
        run.cohort.parked[run] = None

    def _unpark_all(self) -> None:
        """Ask all that are parked again."""
        for cohorts in (*self._lines, filter(None, self._open)):
            for cohort in cohorts:
                for run in cohort.parked:
                    self._enter(run)
                cohort.parked.clear()

    # How old it is

    def _begin(self, kind: int) -> Cohort:
        """The cohort that runs of this class join from now on."""
        if not any(self._open):
            self._opened, self._joined = self._now, 0
        cohort = self._open[kind] = Cohort(kind, self._now)
        self._trust.recent[cohort] = None
        return cohort

    def _close(self) -> None:
        """Runs join other cohorts from now on."""
        for cohort in filter(None, self._open):
            self._await(cohort)
            self._bury(cohort)
        self._open = [None] * CLASSES

    def _bury(self, cohort: Cohort) -> None:
        """Have nothing to do with a cohort that has no blocks, and will have none."""
        line = self._lines[cohort.octave]
        if not cohort.blocks and cohort in line:
            del line[cohort]
            self._trust.recent.pop(cohort, None)

    def _tick(self, now: float) -> None:
        """Move cohorts to the octave of their age."""
        self._now = now
        if self._joined >= self._enough or now - self._opened >= _SPAN_S:
            self._close()
        if now < min(self._dues):
            return
        moves = _MOVES
        for octave, due in enumerate(self._dues):
            if now < due:
                continue
            line = self._lines[octave]
            while line and now >= (leaves := next(iter(line)).time + STARTS[octave + 1]):
                if not moves:
                    return  # and go on at the next call
                moves -= 1
                self._age(next(iter(line)))
            self._dues[octave] = leaves if line else _NEVER

    def _age(self, cohort: Cohort) -> None:
        """Move a cohort to a later octave."""
        kind, octave = cohort.kind, cohort.octave
        older = max(octave + 1, octave_of(self._now - cohort.time))
        if older >= self._oldest:
            self._oldest = older + 1
            self._sort()
        came = self._hazards.came[kind]
        came[octave + 1] += cohort.blocks
        came[older + 1] -= cohort.blocks
        del self._lines[octave][cohort]
        cohort.octave = older
        self._await(cohort)
        if cohort.runs or cohort.parked:
            self._queues[kind][octave].pop(cohort, None)
            self._queues[kind][older][cohort] = None
            if cohort.parked:
                cohort.runs.update(cohort.parked)
                cohort.parked.clear()

    def _await(self, cohort: Cohort) -> None:
        """Have a cohort be of the age that its octave says, until it is older."""
        octave = cohort.octave
        line = self._lines[octave]
        if not line and octave < OCTAVES - 1:
            self._dues[octave] = cohort.time + STARTS[octave + 1]
        line[cohort] = None

    def _renew(self, run: Run) -> None:
        """``run`` was in use until now, by who continues it: its age begins again."""
        cohort = run.cohort
        self._hazards.at_risk(cohort.kind, 1, cohort.octave, -len(run.keys))  # it will come again
        self._restart(run, cohort.kind)

    def _restart(self, run: Run, kind: int) -> None:
        """``run`` is of this class, and its age is nothing."""
        old, new = run.cohort, self._open[kind] or self._begin(kind)
        if old is new:
            if run in old.runs:
                old.runs.move_to_end(run)
            return
        held, count = run.held, len(run.keys)
        if held:
            self._off(run)
        self._trust.count(old, -count, held - count)
        self._bury(old)
        run.cohort = new
        self._joined += count
        self._trust.count(new, count, count - held)
        if held:
            self._enter(run)

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

    def _lowest(self, *, spare: bool = False) -> tuple[float, Cohort] | None:
        """The cohort that is worth least, of those that have runs to ask.

        Args:
            spare: of those that LRU would not hold.
        """
        worth_of, now = self._hazards.worth, self._now
        if spare and self._since != (since := self._trust.edge_octave):
            self._since = since
            self._before = [entry for entry in self._order if entry[3] >= since]
        lowest: Cohort | None = None
        least = _NEVER
        for bound, rising, kind, _, line in self._before if spare else self._order:
            if bound > least:
                break
            if not line:
                continue
            cohort = next(reversed(line)) if rising else next(iter(line))
            # The oldest of a line is about as old as the newest of it that LRU would not hold.
            if spare and cohort.recent and (cohort := next(iter(line))).recent:
                continue
            worth = worth_of(kind, now - cohort.time)
            if worth < least or (worth == least and lowest and cohort.time < lowest.time):
                least, lowest = worth, cohort
        return None if lowest is None else (least, lowest)

    def _least_recent(self) -> tuple[float, Cohort] | None:
        """The cohort that was used first, of those that LRU would hold and have runs to ask."""
        for cohort in self._trust.recent:
            if cohort.runs:
                return self._hazards.worth(cohort.kind, self._now - cohort.time), cohort
        return None

    def _first(self, spare: bool) -> tuple[float, Cohort] | None:
        """The cohort that goes first, and what it is worth.

        Args:
            spare: what LRU would hold is to stay, as far as that goes.
        """
        if spare:
            return self._lowest(spare=True) or self._least_recent()
        return self._lowest()

    def _rising(self, cohort: Cohort) -> bool:
        """Whether blocks of a cohort are worth more as they grow older."""
        table = self._hazards.tables[cohort.kind]
        return table[cohort.octave + 1] > table[cohort.octave]
