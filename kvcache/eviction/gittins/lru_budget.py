"""How far the learned policy may be from LRU: as far as it has earned.

What LRU would hold needs no second cache: it is what was used last, whether it was kept or not,
that is the newest epochs::

    oldest                                                  newest
    epoch   epoch | epoch   epoch   epoch   epoch   epoch   epoch
                  | edge    all these together are as many blocks as there are slots
                    of which a share

So it is known of each block that is asked for whether LRU would have had it, and how many blocks
that LRU would hold are *missing*. A missing block can cost one hit that LRU has, once. What was
*won*, hits that LRU would not have had less hits that only LRU would have had, pays for them.

Always true:

* ``known`` and ``missing`` are those of the recent epochs together, all of the edge's.
* What is allowed to be missing is never more than the slots.
"""

from __future__ import annotations

from collections import OrderedDict

from kvcache.eviction.gittins.epochs import Cohort, Epoch

_FOR_EACH_WON = 5.0  # blocks that may be missing
_FOR_EACH_SLOT = 0.01  # and to begin with
_BOLDEST = 4.0  # times that at most, where more comes back too late for LRU than it finds
_SURE = 16.0  # and so many times the slots were asked for, so that this is no accident
_FORGIVEN = 16.0  # so many times the slots asked for, and most of what was lost is forgotten
_NOTHING = 0.001  # of the blocks asked for: found by LRU, these are none
_MUCH = 0.01  # and so many that were used too long ago for it are worth a try


class LruBudget:
    """An account of what was won against LRU, and of what is missing.

    Args:
        capacity: blocks that the tier can hold.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._of_late = 32 * capacity + 20_000
        self.recent: OrderedDict[Epoch, None] = OrderedDict()
        self.known = 0
        self.missing = 0
        self._edge = Epoch(0.0)  # one that is none, to begin with
        self._edge.recent = False
        self._share = 1.0  # of the edge
        self._won = 0.0
        self._asked = 0.0
        self._found = 0.0  # of these by LRU
        self._beyond = 0.0  # and known, but used too long ago for LRU
        self._first = max(1.0, _FOR_EACH_SLOT * capacity)
        self._stake = self._allowed = self._first

    def count(self, cohort: Cohort, blocks: int, missing: int) -> None:
        """A cohort has so many more blocks, of which so many are not held."""
        epoch = cohort.epoch
        cohort.blocks += blocks
        epoch.blocks += blocks
        if epoch.recent:
            self.known += blocks
        self.miss(epoch, missing)

    def miss(self, epoch: Epoch, blocks: int) -> None:
        """So many more blocks of an epoch are not held."""
        if epoch.recent:
            epoch.missing += blocks
            self.missing += blocks

    def used(self, cohort: Cohort, held: int, missing: int) -> None:
        """Blocks of a cohort are asked for: it has them no longer, they are ``of_now``."""
        known = held + missing
        epoch = cohort.epoch
        cohort.blocks -= known
        epoch.blocks -= known
        if not epoch.recent:
            self._beyond += known
            self._won += held
            return
        self.known -= known
        self.miss(epoch, -missing)
        found = known * self._share if epoch is self._edge else float(known)
        self._found += found
        self._beyond += known - found
        self._won += held - found

    def of_now(self, epoch: Epoch, blocks: int, missing: int) -> None:
        """The newest epoch has so many more blocks: find what LRU would hold now.

        Those of its cohorts are counted already.
        """
        edge, capacity = self._edge, self._capacity
        epoch.blocks += blocks
        self.known += blocks
        self.miss(epoch, missing)
        newer = self.known - edge.blocks
        while newer >= capacity or not edge.recent:
            if edge.recent:
                self.forget(edge)
            edge = next(iter(self.recent))
            newer = self.known - edge.blocks
        self._edge = edge
        rest, blocks = capacity - newer, edge.blocks
        self._share = rest / blocks if rest < blocks else 1.0
        won = self._won
        self._allowed = min(self._stake + (_FOR_EACH_WON * won if won > 0 else won), capacity)

    def forget(self, epoch: Epoch) -> None:
        """LRU would hold nothing of an epoch."""
        del self.recent[epoch]
        epoch.recent = False
        self.known -= epoch.blocks
        self.missing -= epoch.missing

    def passed(self, asked: int) -> None:
        """An epoch is over in which so many blocks were asked for: find what may be missing."""
        self._asked += asked
        if self._asked > self._of_late:
            self._asked, self._found = self._asked / 2, self._found / 2
            self._beyond = self._beyond / 2
        capacity, won = self._capacity, self._won
        if won < 0:
            won *= max(0.0, 1 - asked / (_FORGIVEN * capacity))
        self._won = won = min(won, capacity)
        if (
            self._asked > 2 * capacity
            and self._found <= _NOTHING * self._asked
            and self._beyond >= _MUCH * self._asked
        ):
            self._stake = float(capacity)  # there is nothing to lose
        else:
            self._stake = self._first
            if self._asked > _SURE * capacity:
                odds = (self._beyond - self._found) / max(1.0, self._found)
                self._stake *= max(1.0, min(odds, _BOLDEST))

    @property
    def edge_octave(self) -> int:
        """That of the oldest epoch that LRU would hold some of."""
        return self._edge.octave

    def slack(self) -> float:
        """How many more blocks may be missing; less than none when too many are."""
        return self._allowed - self.missing + (1 - self._share) * self._edge.missing
