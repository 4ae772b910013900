"""The learned policy: a slot goes to who is likely to use it soonest, per second of keeping it.

What is learned is learned of classes of blocks, by ``hazards``: of new chains, of what continues a
known one, of what was used twice, and so on. What was evicted or declined stays known for a while,
so that it is seen when it would have been used; who watches only what he kept learns that what he
kept was worth keeping.

After Aalto, Ayesta, Righter, "On the Gittins index in the M/G/1 queue", Queueing Systems 2009: what
is best to serve next, of jobs of unknown length, is best to keep, of blocks of unknown next use.

Always true here, beside what ``aged`` keeps:

* Nothing learned is LRU, and LRU is what it comes back to where nothing can be learned.
* It learns between two epochs, and that costs the same whatever was seen.
* A block is declined when what would have to leave for it is worth more than it.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import maxsize

from kvcache.eviction.gittins.epochs import RankedRun
from kvcache.eviction.gittins.hazards import AGAIN, ALWAYS, LAST, MORE, NEW, OFTEN
from kvcache.eviction.gittins.ranking import RankedRuns
from kvcache.eviction.policy import Take
from kvcache.keys import Keys, common_prefix_len

_LONG = 256  # blocks of a run to which an answer adds no more: adding takes longer with each
_KIND_OF = [NEW, NEW, AGAIN, AGAIN, *[OFTEN] * 12, ALWAYS, ALWAYS]  # by uses


class _Ends:
    """Whether the last blocks of requests are used again when those before them are.

    Partial blocks are hardly ever; where these are not stored the last block is like any other.
    """

    def __init__(self) -> None:
        self.apart = True
        self._reached = 8.0  # requests whose last block but one was used again
        self._used = 0.0  # and whose last block was

    def see(self, run: RankedRun, left: int) -> None:
        """All blocks of ``run`` were used but for ``left``."""
        if run.cohort.kind == LAST:
            self._used += 1
        elif run.ends:
            self._reached += left <= (0 if self.apart else 1)
            self._used += not left and not self.apart
        self.apart = self._used < self._reached / 4
        if self._reached > 1000:
            self._reached, self._used = self._reached / 2, self._used / 2


_NOT_ASKED: tuple[list[tuple[int, float]], int, int] = ([], maxsize, 0)  # whatever is to go goes


class Gittins(RankedRuns):
    """Ranks runs by an index that it learns from how soon blocks like them were used again."""

    def __init__(self, capacity: int, known_limit: int | None = None) -> None:
        super().__init__(capacity, known_limit)
        self._ends = _Ends()
        self._last: tuple[int, Keys] = (0, ())  # who asked last, and how much was held
        # What `admit` answered, if nothing was told since: what the keys it was asked about are
        # worth, how many of them LRU must not be without, and how many are to be held.
        self._admitted: tuple[list[tuple[int, float]], int, int] | None = None

    # What a policy is told

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        self._tick(now)
        self._lookups += 1
        self._admitted = None
        keys = tuple(chain)
        if len(set(keys)) < len(keys):
            keys = tuple(dict.fromkeys(keys))
        if self._last == (held, keys):
            return  # a request that could not be admitted asks again
        self._last = held, keys
        self._use(keys)
        if len(self._run_of) > self._limit:
            self._forget()

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        runs, run_of, tables = self._runs, self._run_of, self._hazards.tables
        keys = tuple(keys)
        worths: list[tuple[int, float]] = []
        at, asked = 0, len(keys)
        while at < asked:
            run = runs.get(run_of.get(keys[at], 0))
            if run is None:
                count = asked - at
                worth = tables[self._kind_after(keys[at - 1] if at else parent)][0]
            else:
                count = max(1, common_prefix_len(run.keys, run.held, keys, at))
                worth = (
                    self._worth(run.cohort) if run.awaited else tables[_KIND_OF[run.uses + 1]][0]
                )
            worths.append((count, worth))
            at += count
        best = 0.0
        for at in range(len(worths) - 1, -1, -1):  # a prefix is worth what continues it at least
            count, worth = worths[at]
            if worth < best:
                worths[at] = count, best
            else:
                best = worth
        slack = int(self._trust.slack())  # when all of these are missing
        owed = 0 if slack >= 0 else min(asked, -slack)
        first = self._first(spare=slack + asked < 1)
        count = asked if first is None else max(owed, _at_least(worths, first[0]))
        self._admitted = worths, owed, count
        return count

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self._admitted = None
        runs, run_of, trust = self._runs, self._run_of, self._trust
        keys = tuple(keys)
        back: RankedRun | None = None
        at = 0
        while at < len(keys):
            run = runs.get(run_of.get(keys[at], 0))
            before = keys[at - 1] if at else parent
            if run is None:
                count = _unknown(keys, at, run_of)
                self._grow(keys[at : at + count], before, now)
            elif run.awaited and (count := common_prefix_len(run.keys, run.held, keys, at)):
                if count == len(run.keys):
                    run.keys = keys[at : at + count]  # which the index has: they are there once
                self._hold(run, count)
                trust.miss(run.cohort.epoch, -count)
            else:  # it comes back before it is asked for, or out of its order
                taken, _, uses = self._cut(run, keys, at)
                count = len(taken)
                back = self._join(back, taken, count, before, _KIND_OF[uses], uses)
                back.told = True
                trust.of_now(self._epoch, count, 0)
            at += count

    def remove(self, keys: Sequence[bytes]) -> None:
        self._admitted = None
        gone = set(keys)
        numbers = dict.fromkeys(self._run_of.pop(key, 0) for key in keys)
        for run in [self._runs[number] for number in numbers if number]:
            known = len(run.keys)
            held = tuple(key for key in run.keys[: run.held] if key not in gone)
            run.keys = held + tuple(key for key in run.keys[run.held :] if key not in gone)
            if run.held and not held:
                self._leave(run)
            less, away = known - len(run.keys), known - run.held
            run.held = len(held)
            self._trust.count(run.cohort, -less, len(run.keys) - run.held - away)
            if not run.keys:
                self._end(run)

    def evict(self, count: int, take: Take) -> None:
        worths, owed, coming = self._admitted or _NOT_ASKED
        self._admitted = None
        trust = self._trust
        given = 0
        gone = True  # somebody left since the parked were asked last
        while given < count:
            found = self._first(trust.slack() + coming < 1)
            if found is None:
                if not gone:
                    return
                gone = False
                self._unpark_all()
                continue
            worth, cohort, rising = found
            allowed = min(count, max(owed, _at_least(worths, worth)))
            epoch = cohort.epoch
            recent = epoch.recent
            while runs := cohort.runs:
                if given >= allowed:
                    return
                run = next(reversed(runs)) if rising else next(iter(runs))
                held = run.held
                offered = run.keys[max(0, held + given - allowed) : held]
                if went := take(offered):
                    given += went
                    gone = True
                    run.awaited = False
                    self._past[run] = None
                    run.held = held - went
                    if recent:
                        trust.miss(epoch, went)
                    if went == held:
                        self._leave(run)
                if went < len(offered):
                    self._park(run)
                if self._stirred or (recent and trust.slack() + coming < 1):
                    break

    # Runs

    def _use(self, keys: Keys) -> None:
        """Cut ``keys`` off the runs they are in, and make runs of now of them."""
        runs, run_of = self._runs, self._run_of
        new: RankedRun | None = None  # that has what is before
        before: bytes | None = None
        at, end, found = 0, len(keys), 0
        while at < end:
            run = runs.get(run_of.get(keys[at], 0))
            if run is None:
                count = _unknown(keys, at, run_of)
                kind = NEW if new is None or new.cohort.kind in (NEW, ALWAYS) else MORE
                last = at + count - 1
                ends = last + 1 == end
                if ends and self._ends.apart:
                    if count > 1:
                        new = self._join(new, keys[at:last], 0, before, kind, 1)
                        new.ends = True
                        before = keys[last - 1]
                    new = self._join(new, keys[last:], 0, before, LAST, 1)
                else:
                    new = self._join(new, keys[at : last + 1], 0, before, kind, 1)
                    new.ends = ends
            elif (ours := run.keys) == keys[at : at + len(ours)] and (
                new is None or new.cohort.kind != _KIND_OF[run.uses + 1]
            ):
                count = len(ours)
                if run.ends or run.cohort.kind == LAST:
                    self._ends.see(run, 0)
                found += run.held
                run.uses = uses = self._used(run, count, run.held)
                run.parent = before
                run.awaited, run.told, run.ends = True, False, False
                self._past[run] = None
                self._past.move_to_end(run)
                self._restart(run, _KIND_OF[uses])
                new = run
            else:
                taken, held, uses = self._cut(run, keys, at)
                count = len(taken)
                found += held
                if run.ends or run.cohort.kind == LAST:
                    self._ends.see(run, len(run.keys))
                new = self._join(new, taken, held, before, _KIND_OF[uses], uses)
            at += count
            before = keys[at - 1]
        self._asked += end
        self._room -= end
        self._trust.of_now(self._epoch, end, end - found)

    def _grow(self, keys: Keys, parent: bytes | None, now: float) -> None:
        """Blocks that nobody asked for are held: an answer's, or what a restart found."""
        self._tick(now)
        run = self._find(parent)
        kind = self._kind_after(parent)
        known = 0
        if (
            run is not None
            and run.cohort.kind == kind
            and run.held == len(run.keys)
            and run.keys[-1] == parent
        ):  # it was in use until now: its age begins again
            cohort, known = run.cohort, run.held
            self._hazards.at_risk(kind, 0, cohort.epoch.octave, -known)  # it will come again
            self._trust.count(cohort, -known, 0)
            self._restart(run, kind)
            if known >= _LONG:
                run = None
        else:
            run = None
        run = self._join(run, keys, 0, parent, kind, 1)
        self._hold(run, len(keys))
        self._room -= len(keys)
        self._trust.of_now(self._epoch, known + len(keys), 0)
        if len(self._run_of) > self._limit:
            self._forget()

    def _kind_after(self, key: bytes | None) -> int:
        """The class of unknown blocks that continue ``key``."""
        run = self._find(key)
        return NEW if run is None or run.cohort.kind in (NEW, ALWAYS) else MORE


def _at_least(worths: list[tuple[int, float]], least: float) -> int:
    """How many are worth no less than ``least``; so many each are, which never rises."""
    enough = 0
    for count, worth in worths:
        if worth < least:
            break
        enough += count
    return enough


def _unknown(keys: Keys, at: int, run_of: dict[bytes, int]) -> int:
    """How many keys from ``at`` on, which is one of them, are in no run."""
    rest = keys[at:]
    if run_of.keys().isdisjoint(rest):
        return len(rest)
    stop = at + 1
    while stop < len(keys) and keys[stop] not in run_of:
        stop += 1
    return stop - at
