"""The learned policy itself: the calls of the index. The package's docstring explains the method.

Invariants, beside those of ``known_runs`` and ``ranking``:

* A policy that has learned nothing evicts as LRU, and it returns to LRU where nothing can be
  learned.
* It learns between two epochs, at a cost that does not depend on what was observed.
* A block is declined if it is worth less than the block that would be evicted for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import maxsize

from kvcache.eviction.gittins.epochs import RankedRun
from kvcache.eviction.gittins.hazards import (
    EXTENSION,
    LAST,
    NEW,
    REUSED_2,
    REUSED_4,
    REUSED_16,
    Hazards,
)
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.eviction.gittins.side_runs import SideRuns
from kvcache.eviction.policy import Take
from kvcache.keys import Keys, common_prefix_len

# Blocks of a run beyond which generated blocks start a new run: appending takes time linear in it.
_MAX_APPEND_BLOCKS = 256
_CLASS_BY_USES = [NEW, NEW, REUSED_2, REUSED_2, *[REUSED_4] * 12, REUSED_16, REUSED_16]

_Admission = tuple[list[tuple[int, float]], int, int]
"""What ``admit`` decided:

* runs of the incoming blocks, as (blocks, worth); worth never rises from one run to the next;
* how many incoming blocks must be admitted, whatever they are worth;
* how many incoming blocks are admitted.
"""
_ADMIT_ALL: _Admission = ([], maxsize, 0)  # for an eviction without a call of `admit`


class _LastBlocks:
    """Learns whether the last block of a request is reused as often as the blocks before it.

    A partial last block hardly ever is. Where only full blocks are stored, the last block is like
    any other, and a class of its own would only split the observations.

    Attributes:
        separate: the last blocks of requests are in the class ``LAST``.
    """

    def __init__(self) -> None:
        self.separate = True
        # Requests with a reused last block but one. A start of 8 keeps the class until some
        # requests were observed.
        self._reached = 8.0
        self._reused = 0.0  # requests with a reused last block

    def observe(self, run: RankedRun, remaining: int) -> None:
        """Count a use of all blocks of ``run`` but the last ``remaining`` ones."""
        if run.cohort.cls == LAST:
            self._reused += 1
        elif run.ends_request:
            self._reached += remaining <= (0 if self.separate else 1)
            self._reused += not remaining and not self.separate
        self.separate = self._reused < self._reached / 4
        if self._reached > 1000:
            self._reached, self._reused = self._reached / 2, self._reused / 2


class Gittins(SideRuns):
    """Evicts the blocks with the lowest Gittins index, learned from how soon blocks are reused.

    Args:
        capacity: blocks that the index can hold.
        hazards: what is learned about reuse; ``None`` starts with nothing.
        budget: how far to deviate from LRU; ``None`` starts with a stake of 1 % of the capacity.
        known_limit: keys to know at most; ``None`` is about three times the capacity.
    """

    def __init__(
        self,
        capacity: int,
        hazards: Hazards | None = None,
        budget: LruBudget | None = None,
        known_limit: int | None = None,
    ) -> None:
        super().__init__(
            capacity,
            Hazards(capacity) if hazards is None else hazards,
            LruBudget(capacity) if budget is None else budget,
            known_limit,
        )
        self.last_blocks = _LastBlocks()
        self._last_lookup: tuple[int, Keys] = (0, ())  # blocks held, and the chain
        self._last_sides: set[Keys] = set()  # side blocks looked up just before that lookup
        self._sides: set[Keys] = set()  # side blocks looked up since that lookup
        self._admission: _Admission | None = None  # of the `admit` call just before, if any

    # The calls of the index

    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        self._admission = None
        keys = tuple(chain)
        if len(set(keys)) < len(keys):
            keys = tuple(dict.fromkeys(keys))
        if self.expects_sides and self._are_sides(keys):
            if not self._sides:
                self.advance(now)
            if keys not in self._last_sides:
                self._use_sides(keys)
            self._sides.add(keys)
            return
        used = held
        if self._sides:
            self._last_sides, self._sides = self._sides, set()
            used = self._learn_window(keys)
        else:  # otherwise the side blocks and the chain are of one epoch
            self.advance(now)
            if self.side_ids:
                used = 0
        self._lookups += 1
        if self._last_lookup == (held, keys):
            return  # the same request again, because the engine could not schedule it yet
        self._last_lookup = held, keys
        won = self.budget.hits_won
        self._use(keys)
        if used < held and self.budget.hits_won > won:  # the engine computes held blocks again
            self.budget.hits_won = won + (self.budget.hits_won - won) * used / held
        if len(self.run_ids) > self.known_limit:
            self._forget_evicted()

    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        runs, run_ids, tables = self.runs, self.run_ids, self.hazards.tables
        keys = tuple(keys)
        worths: list[tuple[int, float]] = []
        at, total = 0, len(keys)
        while at < total:
            run = runs.get(run_ids.get(keys[at], 0))
            if run is None:
                count = total - at
                worth = tables[self._class_after(keys[at - 1] if at else parent)][0]
            elif run.side:  # may be the last one of its chain
                count = max(1, common_prefix_len(run.keys, run.held, keys, at))
                worth = worths[-1][1] if worths else tables[NEW][0]
            else:
                count = max(1, common_prefix_len(run.keys, run.held, keys, at))
                worth = (
                    self.worth(run.cohort)
                    if run.storing
                    else tables[_CLASS_BY_USES[run.uses + 1]][0]
                )
            worths.append((count, worth))
            at += count
        best = 0.0
        for at in range(len(worths) - 1, -1, -1):  # a block is worth at least its continuation
            count, worth = worths[at]
            if worth < best:
                worths[at] = count, best
            else:
                best = worth
        # All incoming blocks are recent, and missing as long as they are not stored. Those beyond
        # the budget must be admitted.
        slack = int(self.budget.slack())
        must_admit = 0 if slack >= 0 else min(total, -slack)
        victim = self.first_victim(protect_recent=slack + total < 1)
        count = total if victim is None else max(must_admit, _worth_at_least(worths, victim[0]))
        self._admission = worths, must_admit, count
        return count

    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        self._admission = None
        runs, run_ids, budget = self.runs, self.run_ids, self.budget
        keys = tuple(keys)
        prefetched: RankedRun | None = None
        at = 0
        while at < len(keys):
            run = runs.get(run_ids.get(keys[at], 0))
            before = keys[at - 1] if at else parent
            if run is None:
                count = _unknown_count(keys, at, run_ids)
                if self.expects_sides and before is not None and self._is_side(keys[at], before):
                    self._add_side(keys[at : at + count], before, now)
                else:
                    self._add_unknown(keys[at : at + count], before, now)
            elif run.side:
                count = self._add_known_side(run, keys, at, now)
            elif run.storing and (count := common_prefix_len(run.keys, run.held, keys, at)):
                if count == len(run.keys):
                    run.keys = keys[at : at + count]  # share the key objects of the index
                self._add_held(run, count)
                budget.add_missing(run.cohort.epoch, -count)
            else:  # stored before a lookup, or out of order
                taken, _, uses = self._cut(run, keys, at)
                count = len(taken)
                prefetched = self._append(
                    prefetched, taken, count, before, _CLASS_BY_USES[uses], uses
                )
                prefetched.prefetched = True
                budget.add_current(self.current_epoch, count, 0)
            at += count

    def remove(self, keys: Sequence[bytes]) -> None:
        self._admission = None
        removed = set(keys)
        run_ids = dict.fromkeys(self.run_ids.pop(key, 0) for key in keys)
        for run in [self.runs[run_id] for run_id in run_ids if run_id]:
            known = len(run.keys)
            held = tuple(key for key in run.keys[: run.held] if key not in removed)
            run.keys = held + tuple(key for key in run.keys[run.held :] if key not in removed)
            if run.held and not held:
                self._dequeue_empty(run)
            fewer, missing = known - len(run.keys), known - run.held
            run.held = len(held)
            self.budget.add_blocks(run.cohort, -fewer, len(run.keys) - run.held - missing)
            if not run.keys:
                self._delete(run)

    def evict(self, count: int, take: Take) -> None:
        worths, must_admit, incoming = self._admission or _ADMIT_ALL
        self._admission = None
        budget = self.budget
        evicted = self._evict_dead(count, take) if self._dead is not None else 0
        progress = True  # a block was evicted since the parked runs were tried
        while evicted < count:
            victim = self.first_victim(budget.slack() + incoming < 1)
            if victim is None:
                if not progress:
                    return
                progress = False
                self._unpark_all()
                continue
            worth, cohort, newest_first = victim
            allowed = min(count, max(must_admit, _worth_at_least(worths, worth)))
            recent = cohort.epoch.recent
            while runs := cohort.runs:
                if evicted >= allowed:
                    return
                run = next(reversed(runs)) if newest_first else next(iter(runs))
                offered = min(run.held, allowed - evicted)
                if self.expects_sides:
                    taken = self._evict_from(run, offered, take)
                else:
                    taken = take(run.keys[run.held - offered : run.held])
                    if taken:
                        self._record_evicted(run, taken)
                    if taken < offered:
                        self._park(run)
                if taken:
                    evicted += taken
                    progress = True
                if self._victims_stale or (recent and budget.slack() + incoming < 1):
                    break

    # Uses

    def _use(self, keys: Keys) -> None:
        """Record a lookup of ``keys``: move them from their runs to runs of the current epoch."""
        runs, run_ids = self.runs, self.run_ids
        new: RankedRun | None = None  # the current epoch's run of the blocks before `at`
        before: bytes | None = None
        at, end, hits = 0, len(keys), 0
        while at < end:
            run = runs.get(run_ids.get(keys[at], 0))
            if run is None:
                count = _unknown_count(keys, at, run_ids)
                cls = NEW if new is None or new.cohort.cls in (NEW, REUSED_16) else EXTENSION
                last = at + count - 1
                ends_request = last + 1 == end
                if ends_request and self.last_blocks.separate:
                    if count > 1:
                        new = self._append(new, keys[at:last], 0, before, cls, 1)
                        new.ends_request = True
                        before = keys[last - 1]
                    new = self._append(new, keys[last:], 0, before, LAST, 1)
                else:
                    new = self._append(new, keys[at : last + 1], 0, before, cls, 1)
                    new.ends_request = ends_request
            elif (run_keys := run.keys) == keys[at : at + len(run_keys)] and (
                new is None or new.cohort.cls != _CLASS_BY_USES[run.uses + 1]
            ):  # a whole run that cannot be appended to the one before it
                count = len(run_keys)
                if run.ends_request or run.cohort.cls == LAST:
                    self.last_blocks.observe(run, 0)
                hits += run.held
                run.uses = uses = self._count_use(run, count, run.held)
                if not run.side:
                    run.parent = before
                run.storing, run.prefetched, run.ends_request = True, False, False
                self._forget_order[run] = None
                self._forget_order.move_to_end(run)
                self._renew(run, _CLASS_BY_USES[uses])
                new = run
            else:
                taken, held, uses = self._cut(run, keys, at)
                count = len(taken)
                hits += held
                if run.ends_request or run.cohort.cls == LAST:
                    self.last_blocks.observe(run, len(run.keys))
                new = self._append(new, taken, held, before, _CLASS_BY_USES[uses], uses)
            at += count
            before = keys[at - 1]
        self._looked_up += end
        self._epoch_room -= end
        self.budget.add_current(self.current_epoch, end, end - hits)

    def _add_unknown(self, keys: Keys, parent: bytes | None, now: float) -> None:
        """Record stored blocks that no lookup asked for: generated, or restored after a restart."""
        self.advance(now)
        run = self._run_with(parent)
        cls = self._class_after(parent)
        known = 0
        if (
            run is not None
            and run.cohort.cls == cls
            and run.held == len(run.keys)
            and run.keys[-1] == parent
        ):  # generated blocks: the run that they continue was in use until now
            cohort, known = run.cohort, run.held
            # Its blocks start again at age 0: they did not reach the octaves since their last use.
            self.hazards.add_at_risk(cls, 0, cohort.epoch.octave, -known)
            self.budget.add_blocks(cohort, -known, 0)
            self._renew(run, cls)
            if known >= _MAX_APPEND_BLOCKS:
                run = None
        else:
            run = None
        run = self._append(run, keys, 0, parent, cls, 1)
        self._add_held(run, len(keys))
        self._epoch_room -= len(keys)
        self.budget.add_current(self.current_epoch, known + len(keys), 0)
        if len(self.run_ids) > self.known_limit:
            self._forget_evicted()

    def _class_after(self, key: bytes | None) -> int:
        """Return the class of unknown blocks that continue ``key``."""
        run = self._run_with(key)
        return NEW if run is None or run.cohort.cls in (NEW, REUSED_16) else EXTENSION


def _worth_at_least(worths: list[tuple[int, float]], least: float) -> int:
    """Return the number of leading blocks that are worth at least ``least``."""
    blocks = 0
    for count, worth in worths:
        if worth < least:
            break
        blocks += count
    return blocks


def _unknown_count(keys: Keys, at: int, run_ids: dict[bytes, int]) -> int:
    """Return the number of keys from ``at`` on that are in no run; ``keys[at]`` is in none."""
    rest = keys[at:]
    if run_ids.keys().isdisjoint(rest):
        return len(rest)
    stop = at + 1
    while stop < len(keys) and keys[stop] not in run_ids:
        stop += 1
    return stop - at
