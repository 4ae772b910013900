"""The LRU budget: how far the learned policy may deviate from LRU.

LRU would hold the blocks that were used last. These are the newest epochs, so the policy knows what
LRU would hold without simulating it::

    oldest                                                  newest
    epoch   epoch | epoch   epoch   epoch   epoch   epoch   epoch
                  | the *recent* epochs: together as many blocks as there are slots
                    the oldest of them is the *edge*; LRU would hold a share of its blocks

A block is *missing* if LRU would hold it and the tier does not. A missing block can cost one hit
that LRU has, once. So the number of missing blocks is limited: to a *stake* at first, and to more
for each hit that the policy has won against LRU (its hits that LRU would not have had, minus the
hits that only LRU would have had).

Invariants:

* ``recent_blocks`` and ``missing`` are the sums over all recent epochs, the whole edge included.
* The number of blocks that may be missing is never more than the number of slots.
"""

from __future__ import annotations

from collections import OrderedDict

from kvcache.eviction.gittins.epochs import Cohort, Epoch

# Blocks that may be missing for each hit won. With 2, the policy gains little at 1,000 slots of the
# conversation trace (5.7 % instead of 8.8 %, LRU 4.9 %); with 6, random traffic loses up to 0.3
# points against LRU.
_MISSING_PER_HIT_WON = 5.0
# The stake as a share of the slots: what can be lost before anything was won. 0.02 loses more than
# 0.2 points against LRU on some random traffic.
_STAKE_SHARE = 0.01
# The stake is multiplied by the odds, late reuses against LRU hits, up to this factor.
_MAX_STAKE_FACTOR = 4.0
# Lookups of blocks before the odds are trusted, in multiples of the slots: the first phases of
# traffic that changes often look better than they are.
_ODDS_MIN_LOOKUPS = 16.0
# Lost hits are forgotten exponentially; the time constant is this many lookups of blocks, in
# multiples of the slots. Without it, one unlucky phase would turn the policy into LRU for good.
_FORGET_LOOKUPS = 16.0
# LRU finds nothing if its hits are at most this share of the lookups.
_NO_HITS_SHARE = 0.001
# A full deviation is worth trying if late reuses are at least this share of the lookups.
_LATE_REUSE_SHARE = 0.01


class LruBudget:
    """Counts hits won and lost against LRU, and blocks that LRU would hold and the tier does not.

    Args:
        capacity: blocks that the tier can hold.
        stake: blocks that may be missing before anything was won; ``None`` is a hundredth of the
            capacity, at least one.

    Attributes:
        recent: the epochs of which LRU would hold blocks, oldest first; the current one is last.
        recent_blocks: known blocks in all of them.
        missing: known blocks in all of them that the tier does not hold.
        hits_won: hits won minus hits lost against LRU; at most the capacity.
        looked_up: blocks looked up. Halved from time to time, together with ``lru_hits`` and
            ``late_reuses``.
        lru_hits: looked-up blocks that LRU would have held.
        late_reuses: looked-up known blocks that LRU would no longer have held.
        allowed_missing: blocks that may be missing now.
    """

    def __init__(self, capacity: int, stake: float | None = None) -> None:
        self._capacity = capacity
        self.recent: OrderedDict[Epoch, None] = OrderedDict()
        self.recent_blocks = 0
        self.missing = 0
        self._edge = Epoch(0.0)  # a placeholder until the first epoch is counted
        self._edge.recent = False
        self._edge_share = 1.0  # share of the edge's blocks that LRU would hold
        self.hits_won = 0.0
        self.looked_up = 0.0
        self.lru_hits = 0.0
        self.late_reuses = 0.0
        self._halve_lookups = 32 * capacity + 20_000  # the three counts are halved beyond this
        self._base_stake = max(1.0, _STAKE_SHARE * capacity) if stake is None else stake
        self._stake = self.allowed_missing = self._base_stake

    def add_blocks(self, cohort: Cohort, blocks: int, missing: int) -> None:
        """Add known ``blocks`` to a cohort, ``missing`` of them not held. Both may be negative."""
        epoch = cohort.epoch
        cohort.blocks += blocks
        epoch.blocks += blocks
        if epoch.recent:
            self.recent_blocks += blocks
        self.add_missing(epoch, missing)

    def add_missing(self, epoch: Epoch, blocks: int) -> None:
        """Count ``blocks`` of an epoch that are no longer held; negative if they are held again."""
        if epoch.recent:
            epoch.missing += blocks
            self.missing += blocks

    def take_used(self, cohort: Cohort, held: int, missing: int) -> None:
        """Remove looked-up blocks from their cohort; ``add_current`` adds them again.

        Args:
            cohort: the cohort.
            held: blocks that the tier holds: hits.
            missing: known blocks that it does not hold.
        """
        known = held + missing
        epoch = cohort.epoch
        cohort.blocks -= known
        epoch.blocks -= known
        if not epoch.recent:
            self.late_reuses += known
            self.hits_won += held
            return
        self.recent_blocks -= known
        self.add_missing(epoch, -missing)
        lru_hits = known * self._edge_share if epoch is self._edge else float(known)
        self.lru_hits += lru_hits
        self.late_reuses += known - lru_hits
        self.hits_won += held - lru_hits

    def add_current(self, epoch: Epoch, blocks: int, missing: int) -> None:
        """Add known ``blocks`` to the current epoch, and find the edge again.

        The caller has added the blocks to their cohort.
        """
        edge, capacity = self._edge, self._capacity
        epoch.blocks += blocks
        self.recent_blocks += blocks
        self.add_missing(epoch, missing)
        newer = self.recent_blocks - edge.blocks  # blocks in epochs after the edge
        while newer >= capacity or not edge.recent:
            if edge.recent:
                self.retire(edge)
            edge = next(iter(self.recent))
            newer = self.recent_blocks - edge.blocks
        self._edge = edge
        rest, blocks = capacity - newer, edge.blocks
        self._edge_share = rest / blocks if rest < blocks else 1.0
        won = self.hits_won
        earned = _MISSING_PER_HIT_WON * won if won > 0 else won
        self.allowed_missing = min(self._stake + earned, capacity)

    def retire(self, epoch: Epoch) -> None:
        """Record that LRU would no longer hold any block of an epoch."""
        del self.recent[epoch]
        epoch.recent = False
        self.recent_blocks -= epoch.blocks
        self.missing -= epoch.missing

    def end_epoch(self, looked_up: int) -> None:
        """Count the blocks that were looked up in an epoch, and adjust the stake."""
        self.looked_up += looked_up
        if self.looked_up > self._halve_lookups:
            self.looked_up, self.lru_hits = self.looked_up / 2, self.lru_hits / 2
            self.late_reuses = self.late_reuses / 2
        capacity, won = self._capacity, self.hits_won
        if won < 0:
            won *= max(0.0, 1 - looked_up / (_FORGET_LOOKUPS * capacity))
        self.hits_won = won = min(won, capacity)
        if (
            self.looked_up > 2 * capacity
            and self.lru_hits <= _NO_HITS_SHARE * self.looked_up
            and self.late_reuses >= _LATE_REUSE_SHARE * self.looked_up
        ):
            self._stake = float(capacity)  # LRU finds nothing, so nothing can be lost
        else:
            self._stake = self._base_stake
            if self.looked_up > _ODDS_MIN_LOOKUPS * capacity:
                odds = (self.late_reuses - self.lru_hits) / max(1.0, self.lru_hits)
                self._stake *= max(1.0, min(odds, _MAX_STAKE_FACTOR))

    @property
    def edge_octave(self) -> int:
        """The octave of the edge, the oldest epoch of which LRU would hold blocks."""
        return self._edge.octave

    def slack(self) -> float:
        """Return how many more blocks may go missing; negative if too many are."""
        return self.allowed_missing - self.missing + (1 - self._edge_share) * self._edge.missing
