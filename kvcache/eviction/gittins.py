"""The learned policy: a slot goes to who is likely to use it soonest, per second of keeping it.

What is learned is learned of classes of blocks, by ``hazards``: of new chains, of what continues a
known one, of what was used twice, and so on. What was evicted or declined stays known for a while,
so that it is seen when it would have been used; who watches only what he kept learns that what he
kept was worth keeping.

After Aalto, Ayesta, Righter, "On the Gittins index in the M/G/1 queue", Queueing Systems 2009: what
is best to serve next, of jobs of unknown length, is best to keep, of blocks of unknown next use.

Always true here, beside what ``aged`` keeps:

* Nothing learned is LRU, and LRU is what it comes back to where nothing can be learned.
* A step of learning is done by a look-up; it makes the table of one class, and costs the same
  whatever was seen.
* A block is declined when what would have to leave for it is worth more than it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import neg
from sys import maxsize
from typing import NamedTuple

from kvcache.eviction.aged import AgedRuns
from kvcache.eviction.cohorts import Cohort, Run, alike
from kvcache.eviction.hazards import AGAIN, ALWAYS, CLASSES, LAST, MORE, NEW, OFTEN
from kvcache.eviction.policy import Take

_FIRST_LEARN, _LAST_LEARN = 2000, 8000  # blocks asked for between two times of learning


class _Ends:
    """Whether the last blocks of requests are used again when those before them are.

    Partial blocks are hardly ever; where these are not stored the last block is like any other.
    """

    def __init__(self) -> None:
        self.apart = True
        self._reached = 8.0  # requests whose last block but one was used again
        self._used = 0.0  # and whose last block was

    def see(self, run: Run, left: int) -> None:
        """All blocks of ``run`` were used but for ``left``."""
        if run.cohort.kind == LAST:
            self._used += 1
        elif run.ends:
            self._reached += left <= (0 if self.apart else 1)
            self._used += not left and not self.apart
        self.apart = self._used < self._reached / 4
        if self._reached > 1000:
            self._reached, self._used = self._reached / 2, self._used / 2


class _Admitted(NamedTuple):
    """What ``admit`` answered last.

    Attributes:
        worths: of the keys that it was asked about.
        owed: how many of them LRU must not be without.
        coming: and how many are to be held.
        first: who goes first for them, and what that is worth.
    """

    worths: list[float]
    owed: int
    coming: int
    first: tuple[float, Cohort] | None


_NOT_ASKED = _Admitted([], maxsize, 0, None)  # whatever is to go goes


class Gittins(AgedRuns):
    """Ranks runs by an index that it learns from how soon blocks like them were used again."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ends = _Ends()
        self._last: tuple[int, list[bytes]] = (0, [])  # who asked last, and how much was held
        self._admitted: _Admitted | None = None  # by `admit`, if nothing was told since
        self._asked_at = 0.0
        self._asked = 0  # blocks, since something was learned
        self._next_learn = _FIRST_LEARN
        self._to_learn = 0  # classes

    # What a policy is told

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        if self._last[1]:
            self._hazards.passed(now - self._asked_at)
        self._asked_at = now
        self._tick(now)
        keys = list(chain)
        if len(set(keys)) < len(keys):
            keys = list(dict.fromkeys(keys))
        self._admitted = None
        if self._last == (held, keys):
            return  # a request that could not be admitted asks again
        self._last = held, keys
        self._use(keys)
        self._trust.asked(len(keys))
        self._forget()
        self._asked += len(keys)
        self._learn()

    def admit(self, keys: Sequence[bytes], after: bytes | None, now: float) -> int:
        self._now = now
        runs, hazards = self._runs, self._hazards
        stretches: list[tuple[int, float]] = []
        at = 0
        while at < len(keys):
            run = runs.get(keys[at])
            if run is None:
                count = len(keys) - at
                worth = hazards.tables[self._kind_after(keys[at - 1] if at else after)][0]
            else:
                count = max(1, alike(run.keys, run.held, keys, at))
                if run.awaited:
                    worth = hazards.worth(run.cohort.kind, now - run.cohort.time)
                else:
                    worth = hazards.tables[_kind_of(run.uses + 1)][0]
            stretches.append((count, worth))
            at += count
        worths: list[float] = []
        best = 0.0
        for count, worth in reversed(stretches):  # a prefix is worth what continues it at least
            best = max(best, worth)
            worths += [best] * count
        worths.reverse()
        slack = int(self._trust.slack()) + len(keys)  # of these as many may be missing
        owed = max(0, len(keys) - max(0, slack))
        first = self._first(spare=slack < 1)
        count = len(keys) if first is None else max(owed, _at_least(worths, first[0]))
        self._admitted = _Admitted(worths, owed, count, first)
        return count

    def add(self, keys: Sequence[bytes], after: bytes | None, now: float) -> None:
        self._now = now
        self._admitted = None
        runs = self._runs
        back: Run | None = None
        at = 0
        while at < len(keys):
            run, before = runs.get(keys[at]), keys[at - 1] if at else after
            if run is None:
                count = _unknown(keys, at, runs)
                self._grow(list(keys[at : at + count]), before)
            elif run.awaited and (count := alike(run.keys, run.held, keys, at)):
                self._hold(run, count)
            else:  # it comes back before it is asked for, or out of its order
                taken, _, uses = self._cut(run, keys, at)
                count = len(taken)
                back = self._join(back, taken, count, before, _kind_of(uses), uses)
                back.told = True
            at += count
        self._forget()

    def remove(self, keys: Sequence[bytes]) -> None:
        self._admitted = None
        gone = set(keys)
        for run in dict.fromkeys(run for key in keys if (run := self._runs.pop(key, None))):
            known = len(run.keys)
            held = [key for key in run.keys[: run.held] if key not in gone]
            run.keys = held + [key for key in run.keys[run.held :] if key not in gone]
            if run.held and not held:
                self._leave(run)
            less, away = known - len(run.keys), known - run.held
            run.held = len(held)
            self._trust.count(run.cohort, -less, len(run.keys) - run.held - away)
            if not run.keys:
                self._past.pop(run, None)
                self._bury(run.cohort)

    def evict(self, count: int, take: Take) -> None:
        worths, owed, coming, found = self._admitted or _NOT_ASKED
        self._admitted = None
        trust = self._trust
        given = 0
        gone = True  # somebody left since the parked were asked last
        while given < count:
            spare = trust.slack() + coming < 1
            found = found or self._first(spare)
            if found is None:
                if not gone:
                    return
                gone = False
                self._unpark_all()
                continue
            (worth, cohort), found = found, None
            allowed = min(count, max(owed, _at_least(worths, worth)))
            rising, recent = self._rising(cohort), cohort.recent
            self._stirred = False
            while runs := cohort.runs:
                if given >= allowed:
                    return
                run = next(reversed(runs)) if rising else next(iter(runs))
                held = run.held
                offered = run.keys[max(0, held - (allowed - given)) : held]
                if went := take(offered):
                    given += went
                    gone = True
                    run.awaited = False
                    self._past[run] = None
                    run.held = held - went
                    if recent:
                        cohort.missing += went
                        trust.missing += went
                    if not run.held:
                        self._leave(run)
                if went < len(offered):
                    self._park(run)
                if self._stirred or (recent and trust.slack() + coming < 1):
                    break

    # Runs

    def _use(self, keys: list[bytes]) -> None:
        """Cut ``keys`` off the runs they are in, and make runs of now of them."""
        runs = self._runs
        new: Run | None = None
        at = 0
        while at < len(keys):
            run = runs.get(keys[at])
            before = keys[at - 1] if at else None
            if run is None:
                count = _unknown(keys, at, runs)
                kind, last = self._kind_after(before), at + count - 1
                ends = last + 1 == len(keys)
                if ends and self._ends.apart:
                    if count > 1:
                        new = self._join(new, keys[at:last], 0, before, kind, 1)
                        new.ends = True
                        before = keys[last - 1]
                    new = self._join(new, keys[last:], 0, before, LAST, 1)
                else:
                    new = self._join(new, keys[at : last + 1], 0, before, kind, 1)
                    new.ends = ends
            elif (new is None or new.cohort.kind != _kind_of(run.uses + 1)) and _all(run, keys, at):
                count = len(run.keys)
                if run.ends or run.cohort.kind == LAST:
                    self._ends.see(run, 0)
                uses = self._used(run, count, run.held)
                self._again(run, before, _kind_of(uses), uses)
                new = run
            else:
                taken, held, uses = self._cut(run, keys, at)
                count = len(taken)
                if run.ends or run.cohort.kind == LAST:
                    self._ends.see(run, len(run.keys))
                new = self._join(new, taken, held, before, _kind_of(uses), uses)
            at += count

    def _grow(self, keys: list[bytes], after: bytes | None) -> None:
        """Blocks that nobody asked for are held: an answer's, or what a restart found."""
        run = self._runs.get(after) if after is not None else None
        kind = self._kind_after(after)
        if (
            run is not None
            and run.cohort.kind == kind
            and run.held == len(run.keys)
            and run.keys[-1] == after
        ):
            self._renew(run)
        else:
            run = None
        run = self._join(run, keys, 0, after, kind, 1)
        self._hold(run, len(keys))

    def _kind_after(self, key: bytes | None) -> int:
        """The class of unknown blocks that continue ``key``."""
        run = self._runs.get(key) if key is not None else None
        return NEW if run is None or run.cohort.kind in (NEW, ALWAYS) else MORE

    def _learn(self) -> None:
        """One step of learning, when it is time for it."""
        if self._to_learn:
            self._to_learn -= 1
            self._hazards.learn(self._to_learn)
            if not self._to_learn:
                self._hazards.apply()
                self._sort()
        elif self._asked >= self._next_learn:
            self._asked = 0
            self._next_learn = min(self._next_learn * 5 // 4, _LAST_LEARN)
            self._hazards.pool()
            self._to_learn = CLASSES


def _kind_of(uses: int) -> int:
    if uses < 2:
        return NEW
    return AGAIN if uses < 4 else OFTEN if uses < 16 else ALWAYS


def _at_least(worths: list[float], least: float) -> int:
    """How many of ``worths``, which never rise, are no less than ``least``."""
    return bisect_right(worths, -least, key=neg)


def _all(run: Run, keys: Sequence[bytes], at: int) -> bool:
    """Whether all of ``run`` is asked for by ``keys`` from ``at`` on."""
    ours = run.keys
    return at + len(ours) <= len(keys) and ours == keys[at : at + len(ours)]


def _unknown(keys: Sequence[bytes], at: int, runs: dict[bytes, Run]) -> int:
    """How many keys from ``at`` on, which is one of them, are in no run."""
    rest = keys[at:]
    if runs.keys().isdisjoint(rest):
        return len(rest)
    stop = at + 1
    while stop < len(keys) and keys[stop] not in runs:
        stop += 1
    return stop - at
