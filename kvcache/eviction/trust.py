"""How far the learned policy may be from LRU: as far as it has earned.

What LRU would hold needs no second cache: it is what was used last, whether it was kept or not,
that is the newest cohorts::

    oldest                                                        newest
    cohort   cohort | cohort   cohort   cohort   cohort   cohort   cohort
                    | edge     all these together are as many blocks as there are slots
                      of which a share

So it is known of each block that is asked for whether LRU would have had it, and how many blocks
that LRU would hold are *missing*. A missing block can cost one hit that LRU has, once. What was
*won*, hits that LRU would not have had less hits that only LRU would have had, pays for them.

Always true:

* ``known`` and ``missing`` are those of the recent cohorts together, all of the edge's.
* What is allowed to be missing is never more than the slots.
"""

from __future__ import annotations

from collections import OrderedDict

from kvcache.eviction.cohorts import Cohort

_FOR_EACH_WON = 8.0  # blocks that may be missing
_FOR_EACH_SLOT = 0.01  # and to begin with
_BOLDEST = 4.0  # times that at most, where more comes back too late for LRU than it finds
_SURE = 16.0  # and so many times the slots were asked for, so that this is no accident
_FORGIVEN = 16.0  # so many times the slots asked for, and most of what was lost is forgotten
_NOTHING = 0.001  # of the blocks asked for: found by LRU, these are none
_MUCH = 0.01  # and so many that were used too long ago for it are worth a try


class Trust:
    """An account of what was won against LRU, and of what is missing.

    Args:
        capacity: blocks that the tier can hold.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._of_late = 32 * capacity + 20_000
        self.recent: OrderedDict[Cohort, None] = OrderedDict()
        self.known = 0
        self.missing = 0
        self._edge: Cohort | None = None
        self._share = 1.0  # of the edge
        self._won = 0.0
        self._asked = 0.0
        self._found = 0.0  # of these by LRU
        self._beyond = 0.0  # and known, but used too long ago for LRU
        self._first = max(1.0, _FOR_EACH_SLOT * capacity)
        self._allowed = self._first

    def count(self, cohort: Cohort, blocks: int, missing: int) -> None:
        """A cohort has so many more blocks, of which so many are not held."""
        cohort.blocks += blocks
        if cohort.recent:
            cohort.missing += missing
            self.known += blocks
            self.missing += missing

    def used(self, cohort: Cohort, held: int, missing: int) -> None:
        """Blocks of a cohort are asked for."""
        known = held + missing
        if cohort.recent:
            found = known * self._share if cohort is self._edge else known
            self._found += found
            self._beyond += known - found
            self._won += held - found
        else:
            self._beyond += known
            self._won += held

    def asked(self, blocks: int) -> None:
        """So many were asked for: find what LRU would hold now, and what may be missing."""
        recent = self.recent
        while recent:
            edge = next(iter(recent))
            newer = self.known - edge.blocks
            if newer < self._capacity:
                self._edge = edge
                self._share = min(1.0, (self._capacity - newer) / max(1, edge.blocks))
                break
            del recent[edge]
            edge.recent = False
            self.known = newer
            self.missing -= edge.missing
        self._asked += blocks
        if self._asked > self._of_late:
            self._asked, self._found = self._asked / 2, self._found / 2
            self._beyond = self._beyond / 2
        capacity, asked, won = self._capacity, self._asked, self._won
        if won < 0:
            won *= max(0.0, 1 - blocks / (_FORGIVEN * capacity))
        self._won = won = min(won, capacity)
        if (
            asked > 2 * capacity
            and self._found <= _NOTHING * asked
            and self._beyond >= _MUCH * asked
        ):
            self._allowed = capacity  # there is nothing to lose
        else:
            stake = self._first
            if asked > _SURE * capacity:
                odds = (self._beyond - self._found) / max(1.0, self._found)
                stake *= max(1.0, min(odds, _BOLDEST))
            bank = _FOR_EACH_WON * won if won > 0 else won
            self._allowed = min(stake + bank, capacity)

    @property
    def edge_octave(self) -> int:
        """That of the oldest cohort that LRU would hold some of."""
        return self._edge.octave if self._edge is not None else 0

    def slack(self) -> float:
        """How many more blocks may be missing; less than none when too many are."""
        missing = float(self.missing)
        if (edge := self._edge) is not None:
            missing -= (1 - self._share) * edge.missing
        return self._allowed - missing
