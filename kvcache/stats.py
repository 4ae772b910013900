"""What a stack counts: plain integers, since it was opened."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.tier import TierStats


@dataclass(frozen=True, slots=True)
class LowerStats:
    """What a lower tier was asked and did since it was opened. Most counts are in blocks."""

    lookup_blocks: int
    hit_blocks: int  # of these held
    loaded_blocks: int
    missed_blocks: int  # said to be held, and not loaded
    skipped_blocks: int  # not asked for, or held and not loaded: computing them takes less time
    stored_blocks: int
    known_blocks: int  # not written, since the tier holds them
    declined_blocks: int  # offered, and not taken
    dropped_blocks: int  # never offered: the queue was full, or the breaker open
    once_blocks: int  # not offered so far, since they were not used again
    queued_nbytes: int
    errors: int  # calls that failed or came late


@dataclass(frozen=True, slots=True)
class StackStats:
    """Counts of L1, and of every tier below it."""

    profile: str
    tiers: tuple[TierStats, ...]
    lower: tuple[LowerStats, ...] = ()

    @property
    def pinned_slots(self) -> int:
        """Slots of L1 under leases that have not ended; 0 when nothing is in flight."""
        return self.tiers[0].pinned_slots
