"""The counters of a stack and its tiers, as plain integers: the only source of every metric."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from kvcache.guards.calls import TierError, as_count, result_of
from kvcache.tier import Tier, TierStats, TierUsage


class TierName(NamedTuple):
    """A tier's name and kind in its profile."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class LowerStats:
    """Counters of a lower tier since it was opened. Names end in the unit."""

    block_nbytes: int
    lookup_blocks: int  # looked up in the tier; with ``lookup = "load"``, asked for by loads
    hit_blocks: int  # lookups that the tier answered with yes; with ``lookup = "load"``, loaded
    loaded_blocks: int
    loaded_nbytes: int
    missed_blocks: int  # asked for in a load, but not loaded; with ``lookup = "load"``, none
    skipped_blocks: int  # not looked up, or held but not loaded: computing them is faster
    stored_blocks: int  # written to the tier
    stored_nbytes: int
    known_blocks: int  # not written: the tier held them, or did when this process last used them
    declined_blocks: int  # offered, but the tier declined them or the call failed
    dropped_blocks: int  # not offered: the write queue was full or the circuit breaker open
    withheld_blocks: int  # not offered yet: ``writes = "hot"`` waits for a second use
    queued_nbytes: int  # waiting to be written
    errors: int  # calls that failed or missed the deadline
    breaker_open: bool  # the circuit breaker refuses calls after failures in a row
    usage: TierUsage  # as the tier reports it


def usage_of(tier: Tier) -> TierUsage:
    """Return ``tier.usage()``, checked; an empty ``TierUsage`` if the call fails or is invalid."""

    def checked_usage() -> TierUsage:
        reported = tier.usage()
        used, limit, evicted = (
            None if number is None else as_count(number)
            for number in (reported.used_nbytes, reported.limit_nbytes, reported.evicted_blocks)
        )
        rejected, declined = (
            {str(reason): as_count(blocks) for reason, blocks in by_reason.items()}
            for by_reason in (reported.rejected_blocks, reported.declined_blocks)
        )
        return TierUsage(used, limit, evicted, rejected, declined)

    with suppress(TierError):
        return result_of(checked_usage)
    return TierUsage()


@dataclass(frozen=True, slots=True)
class StackStats:
    """Counters of L1 and of every lower tier; direct tiers have no L1."""

    profile: str
    tiers: tuple[TierStats, ...]
    lower: tuple[LowerStats, ...] = ()
    names: tuple[TierName, ...] = ()  # of all tiers, nearest first
    loaded_blocks: int = 0  # read from L1 under leases that ended without failure

    @property
    def pinned_slots(self) -> int:
        """L1 slots under leases that have not ended; 0 when nothing is in flight."""
        return sum(tier.pinned_slots for tier in self.tiers)
