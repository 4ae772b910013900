"""Runs by class and age, of blocks that are held and of blocks that have left.

A *run* here is blocks of one chain, head first, that were used last at one time and are of one
class. It is known beyond its eviction::

    Run     keys   a0 a1 a2 a3 | a4 a5
                   held          known: evicted, declined, or not there yet

    _lines[octave]         all runs whose age is in an octave, the oldest first
    _queues[kind][octave]  those that hold blocks, by class: here victims are found

Always true here:

* ``run.keys[: run.held]`` are the blocks of the run that the index holds. Every known key is in one
  run, every run in the line of its octave, and if it holds blocks in its queue or parked.
* A run is parked when its tail was kept, until what continued it has left, or it comes to the next
  octave, or there is nobody else to ask.
* No more keys are known than ``_limit``; those not held are forgotten first, the first to leave
  first. A run without keys is nowhere.
* A call moves no more than ``_MOVES`` runs from octave to octave; what is late moves at the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import frexp

from kvcache.eviction.hazards import CLASSES, OCTAVES, STARTS, Hazards, octave_of
from kvcache.eviction.policy import Policy

_TICKS_PER_S = 1024
_MOVES = 256
_TOLD = 17  # octave, of two minutes, up to which what came back is asked for by who had it come


class Run:
    """Blocks of one chain that were last used at one time.

    Attributes:
        keys: those that are known, in order; the first ``held`` are in the index.
        after: the key that the first of them continued.
        time: when they were used.
        kind: their class.
        uses: how often, at least.
        octave: of their age, as last seen.
        awaited: asked for, and none has left: who has more of it stored does not use it again.
        told: it came back before the request asked: that does not use it again either.
        ends: a request ended with it, or with one block more.
        queue: where it is found when blocks must go; none when it holds none, or is parked.
    """

    __slots__ = (
        "after", "awaited", "ends", "held", "keys", "kind", "octave", "queue", "time", "told",
        "uses",
    )  # fmt: skip

    def __init__(self, after: bytes | None, time: float, kind: int, uses: int) -> None:
        self.keys: list[bytes] = []
        self.held = 0
        self.after = after
        self.time = time
        self.kind = kind
        self.uses = uses
        self.octave = 0
        self.awaited = True
        self.told = False
        self.ends = False
        self.queue: Line | None = None


Line = OrderedDict[Run, None]


class AgedRuns(Policy):
    """What a policy knows that ranks runs by their class and age."""

    def __init__(self, capacity: int) -> None:
        self._limit = capacity + max(4 * capacity, 24_000)
        self._hazards = Hazards(capacity)
        self._runs: dict[bytes, Run] = {}  # of every known key
        self._lines = [Line() for _ in range(OCTAVES)]
        self._queues = [[Line() for _ in range(OCTAVES)] for _ in range(CLASSES)]
        self._parked = Line()
        self._past = Line()  # all runs with keys that are not held, and some others
        self._order: list[tuple[float, bool, int, Line]] = []
        self._stirred = False  # what was parked may be worth less than what is looked at
        self._now = 0.0
        self._ticks = 0
        self._oldest = 1  # octave that no run has come to yet
        self._sort()

    # What a run has

    def _join(
        self,
        run: Run | None,
        keys: list[bytes],
        held: int,
        after: bytes | None,
        now: float,
        kind: int,
        uses: int,
    ) -> Run:
        """Put ``keys``, the first ``held`` of them held, at the end of ``run`` or of a new one."""
        if run is None or run.kind != kind or (held and run.held < len(run.keys)):
            run = Run(after, now, kind, uses)
            self._lines[0][run] = None
            self._past[run] = None
        run.uses = min(run.uses, uses)
        run.keys += keys
        self._runs.update(dict.fromkeys(keys, run))
        self._hazards.at_risk(kind, 0, 0, len(keys))
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
        uses = self._used(run, count)
        held = max(0, min(run.held, first + count) - first)
        del ours[first : first + count]
        if held:
            run.held -= held
            if not run.held:
                self._leave(run)
        if not ours:
            self._bury(run)
        elif not first:
            run.after = taken[-1]
        return taken, held, uses

    def _used(self, run: Run, count: int) -> int:
        """So many blocks of ``run`` are used now; how often that makes it."""
        octave = max(run.octave, octave_of(self._now - run.time))
        if run.told and octave <= _TOLD:
            return run.uses
        if octave > run.octave:
            self._hazards.at_risk(run.kind, run.octave + 1, octave, count)
        self._hazards.used(run.kind, octave, count)
        return run.uses + 1

    def _again(self, run: Run, after: bytes | None, kind: int, uses: int) -> None:
        """All of ``run`` is used now: it is a new one, of another class perhaps."""
        self._hazards.at_risk(kind, 0, 0, len(run.keys))
        run.kind, run.uses, run.after = kind, uses, after
        run.awaited, run.told, run.ends = True, False, False
        self._past[run] = None
        self._past.move_to_end(run)
        self._restart(run)

    def _hold(self, run: Run, count: int) -> None:
        """The next ``count`` blocks of ``run`` are in the index from now on."""
        if not run.held:
            self._enter(run)
        run.held += count

    def _bury(self, run: Run) -> None:
        del self._lines[run.octave][run]
        self._past.pop(run, None)

    def _forget(self) -> None:
        """Forget keys that are not held, the first to leave first, until few enough are known."""
        runs, past = self._runs, self._past
        while len(runs) > self._limit and past:
            run, _ = past.popitem(last=False)
            for key in run.keys[run.held :]:
                del runs[key]
            del run.keys[run.held :]
            if not run.keys:
                del self._lines[run.octave][run]

    # Where it is found

    def _enter(self, run: Run) -> None:
        queue = run.queue = self._queues[run.kind][run.octave]
        queue[run] = None

    def _off(self, run: Run) -> None:
        """``run`` is not found where it is."""
        if run.queue is None:
            del self._parked[run]
        else:
            del run.queue[run]

    def _leave(self, run: Run) -> None:
        """``run`` holds nothing any more: what it continued may be a tail now."""
        self._off(run)
        run.queue = None
        if run.after is not None:
            before = self._runs.get(run.after)
            if before is not None and before in self._parked:
                self._unpark(before)

    def _park(self, run: Run) -> None:
        assert run.queue is not None
        del run.queue[run]
        run.queue = None
        self._parked[run] = None

    def _unpark(self, run: Run) -> None:
        del self._parked[run]
        self._enter(run)
        self._stirred = True

    # How old it is

    def _tick(self, now: float) -> None:
        """Move runs to the octave of their age.

        An octave of many seconds is looked at seldom: when the clock's binary digit of a sixteenth
        of it changes, or a higher one.
        """
        self._now = now
        ticks = int(now * _TICKS_PER_S)
        if ticks == self._ticks:
            return
        upto = (ticks ^ self._ticks).bit_length() + 5
        moves = _MOVES
        lines, queues, came = self._lines, self._queues, self._hazards.came
        for octave in range(min(upto, self._oldest + 1, OCTAVES - 1) - 1, -1, -1):
            line, limit = lines[octave], now - STARTS[octave + 1]
            while line:
                run = next(iter(line))
                if run.time > limit:
                    break
                if not moves:
                    return  # and go on at the next call
                moves -= 1
                older = frexp((now - run.time) * _TICKS_PER_S)[1]
                if older >= self._oldest:
                    older = min(older, OCTAVES - 1)
                    self._oldest = older + 1
                    self._sort()
                counts, blocks = came[run.kind], len(run.keys)
                counts[octave + 1] += blocks
                counts[older + 1] -= blocks
                del line[run]
                lines[older][run] = None
                run.octave = older
                if run.held:
                    if (queue := run.queue) is None:
                        del self._parked[run]
                    else:
                        del queue[run]
                    queue = run.queue = queues[run.kind][older]
                    queue[run] = None
        self._ticks = ticks

    def _renew(self, run: Run) -> None:
        """``run`` was in use until now, by who continues it: its age begins again."""
        self._hazards.at_risk(run.kind, 1, run.octave, -len(run.keys))  # it will come there again
        self._restart(run)

    def _restart(self, run: Run) -> None:
        """The age of ``run`` is nothing."""
        del self._lines[run.octave][run]
        run.time, run.octave = self._now, 0
        self._lines[0][run] = None
        if run.held:
            self._off(run)
            self._enter(run)

    # What it is worth

    def _sort(self) -> None:
        """Sort the queues by the least that a run in them can be worth."""
        self._order = sorted(
            (
                (
                    min(table[octave], table[octave + 1]),
                    table[octave + 1] > table[octave],
                    kind,
                    line,
                )
                for kind, (table, lines) in enumerate(
                    zip(self._hazards.tables, self._queues, strict=True)
                )
                for octave, line in enumerate(lines[: self._oldest])
            ),
            key=lambda entry: entry[0],
        )

    def _lowest(self) -> tuple[float, Run, float] | None:
        """The run that is worth least, of those not parked; and what the others are at least."""
        hazards, now = self._hazards, self._now
        lowest = None
        least = others = float("inf")
        for bound, rising, kind, line in self._order:
            if bound > least:
                others = min(others, bound)
                break
            if line:
                run = next(reversed(line)) if rising else next(iter(line))
                worth = hazards.worth(kind, now - run.time)
                older = lowest is None or run.time < lowest.time
                if worth < least or (worth == least and older):
                    least, lowest, others = worth, run, least
                elif worth < others:
                    others = worth
        return None if lowest is None else (least, lowest, others)

    def _next(
        self, queue: Line | None, gone: Run, others: float
    ) -> tuple[float, Run, float] | None:
        """The run that is found after one that left this queue, if it is worth least now."""
        if not queue:
            return None
        kind, octave = gone.kind, gone.octave
        table = self._hazards.tables[kind]
        run = next(reversed(queue)) if table[octave + 1] > table[octave] else next(iter(queue))
        worth = self._hazards.worth(kind, self._now - run.time)
        return (worth, run, others) if worth < others else None


def alike(ours: list[bytes], first: int, keys: Sequence[bytes], at: int) -> int:
    """How many keys ``ours`` from ``first`` and ``keys`` from ``at`` begin with alike."""
    count = min(len(ours) - first, len(keys) - at)
    if ours[first : first + count] == keys[at : at + count]:
        return count
    return next(i for i in range(count) if ours[first + i] != keys[at + i])
