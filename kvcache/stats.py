"""What a stack and its tiers did, in plain integers: the one source of every metric."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from kvcache.guards.calls import TierError, as_count, result_of
from kvcache.tier import Tier, TierStats, TierUsage


class TierName(NamedTuple):
    """What a profile calls a tier."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class LowerStats:
    """What a lower tier was asked and did since it was opened. Most counts are in blocks."""

    block_nbytes: int
    lookup_blocks: int
    hit_blocks: int  # of these held
    loaded_blocks: int
    missed_blocks: int  # said to be held, and not loaded
    skipped_blocks: int  # not asked for, or held and not loaded: computing them takes less time
    stored_blocks: int
    known_blocks: int  # not written, since the tier holds them
    declined_blocks: int  # offered, and not taken
    dropped_blocks: int  # never offered: the queue was full, or the breaker open
    withheld_blocks: int  # not offered so far, since they were not used again
    queued_nbytes: int
    errors: int  # calls that failed or came late
    breaker_open: bool  # not asked, since calls failed in a row
    usage: TierUsage  # by its own account


def usage_of(tier: Tier) -> TierUsage:
    """What ``tier`` says of itself; nothing if that fails, or is not what it should be."""

    def usage() -> TierUsage:
        given = tier.usage()
        used, limit, evicted = (
            None if number is None else as_count(number)
            for number in (given.used_nbytes, given.limit_nbytes, given.evicted_blocks)
        )
        rejected = {
            str(reason): as_count(blocks) for reason, blocks in given.rejected_blocks.items()
        }
        return TierUsage(used, limit, evicted, rejected)

    with suppress(TierError):
        return result_of(usage)
    return TierUsage()


@dataclass(frozen=True, slots=True)
class StackStats:
    """Counts of L1, and of every tier below it."""

    profile: str
    tiers: tuple[TierStats, ...]
    lower: tuple[LowerStats, ...] = ()
    names: tuple[TierName, ...] = ()  # of all of them, L1 first
    loaded_blocks: int = 0  # lent by L1 to be read, in leases that ended well

    @property
    def pinned_slots(self) -> int:
        """Slots of L1 under leases that have not ended; 0 when nothing is in flight."""
        return self.tiers[0].pinned_slots
