"""The live stack's calls on live indexes, for blocks that have no bytes.

For each request of a trace, what an engine's connector does for one that is computed at once::

    lower tiers:  contains, and what continues L1's prefix comes up into L1, up to a hole
    L1:           access(chain), then reserve and publish what was not found; then the hint
    lower tiers:  each is offered what L1 took, as far as it does not have it

Always true here:

* The indexes and policies are those of ``kvcache.index`` and ``kvcache.eviction``; their clock is
  the trace's.
* A block counts as found where it was before the request came; L1 is asked first.
* Nothing is ever late, skipped, dropped or failed: this is what the policy is worth, not the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from kvcache.eviction import Policy, policy_class
from kvcache.index import Index
from kvcache.replay.trace import Trace

TICK = 256  # requests between two calls of `ticked`


@dataclass(frozen=True, slots=True)
class TierOutcome:
    """What one tier did. Counts are in blocks."""

    capacity_blocks: int
    hit_blocks: int  # found here, and in no tier above
    read_blocks: int  # copied out of it: to the engine from L1, to L1 from a lower tier
    written_blocks: int
    evicted_blocks: int
    declined_blocks: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy with tiers of these capacities, L1 first, over one trace."""

    policy: str
    tiers: tuple[TierOutcome, ...]
    requests: int
    block_accesses: int
    prompt_tokens: int
    hit_tokens: int
    cpu_s: float  # of the indexes and the policy

    @property
    def hit_blocks(self) -> int:
        """Found in any tier."""
        return sum(tier.hit_blocks for tier in self.tiers)

    @property
    def us_per_block(self) -> float:
        """Microseconds of processor time for each block that was asked for."""
        return self.cpu_s / max(1, self.block_accesses) * 1e6


def replay(
    trace: Trace,
    policy: str,
    capacities: Sequence[int],
    ticked: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Replay ``trace``.

    Args:
        trace: who asks for what.
        policy: the name of the policy of every tier.
        capacities: blocks of each tier, L1 first.
        ticked: called now and then with the number of requests replayed since it was last called.
    """
    tiers = _Tiers(policy_class(policy), capacities)
    chains = trace.keys()
    hit_tokens = 0
    begun = time.process_time()
    for number, (now, tokens, chain, done) in enumerate(
        zip(trace.times_s, trace.tokens, chains, trace.done, strict=True), 1
    ):
        found = tiers.request(chain, now)
        if done < len(chain):
            tiers.front.mark_done(chain[done:])
        hit_tokens += min(found * trace.block_tokens, tokens)
        if not number % TICK:
            ticked(TICK)
    spent = time.process_time() - begun
    ticked(len(trace) % TICK)
    return Outcome(
        policy=policy,
        tiers=tiers.outcome(),
        requests=len(trace),
        block_accesses=len(trace.blocks),
        prompt_tokens=sum(trace.tokens),
        hit_tokens=hit_tokens,
        cpu_s=spent,
    )


class _Tiers:
    """An index for each tier."""

    def __init__(self, policy: type[Policy], capacities: Sequence[int]) -> None:
        self._now = 0.0
        indexes = [Index(policy(capacity), lambda: self._now) for capacity in capacities]
        for index, capacity in zip(indexes, capacities, strict=True):
            index.open_slots(capacity)
        indexes[0].admission = len(indexes) == 1  # what L1 declines would reach no tier
        self.front, *self.lower = indexes
        self._hits = [0] * len(indexes)
        self._reads = [0] * len(indexes)

    def request(self, chain: list[bytes], now: float) -> int:
        """A request for ``chain`` comes and is computed; how many of its blocks were found."""
        self._now = now
        front = self.front
        sources = self._bring_up(chain) if self.lower else []
        found = front.access(chain, 0)
        self._reads[0] += found
        for source in range(1, len(self._hits)):
            below = sources[:found].count(source)
            self._hits[source] += below
            self._hits[0] -= below
        self._hits[0] += found
        if found < len(chain):
            positions, slots = front.reserve(chain[found:], chain[found - 1] if found else None)
            front.publish(slots)
            for index in self.lower:
                _write(index, chain, [found + at for at in positions])
        return found

    def _bring_up(self, chain: list[bytes]) -> list[int]:
        """Bring into L1 what lower tiers have; of each block, in which tier it was before."""
        front, sources = self.front, self._sources(chain)
        if not any(sources):
            return sources
        at = 0
        for source, run in groupby(sources):
            end = at + sum(1 for _ in run)
            if source:
                keys = chain[at:end]
                positions, slots = front.reserve(keys, chain[at - 1] if at else None)
                front.publish(slots)
                self._reads[source] += len(slots)
                for position in reversed(positions):  # as the disk does, one by one
                    self.lower[source - 1].access([keys[position]], 0)
                if len(slots) < len(keys):
                    break
            at = end
        return sources

    def _sources(self, chain: list[bytes]) -> list[int]:
        indexes = [self.front, *self.lower]
        sources: list[int] = []
        for key in chain:
            source = next((at for at, index in enumerate(indexes) if key in index), None)
            if source is None:
                break
            sources.append(source)
        return sources

    def outcome(self) -> tuple[TierOutcome, ...]:
        return tuple(
            TierOutcome(
                capacity_blocks=index.slots,
                hit_blocks=hits,
                read_blocks=reads,
                written_blocks=index.stored_blocks,
                evicted_blocks=index.evicted_blocks,
                declined_blocks=index.declined_blocks,
            )
            for index, hits, reads in zip(
                [self.front, *self.lower], self._hits, self._reads, strict=True
            )
        )


def _write(index: Index, chain: list[bytes], places: Sequence[int]) -> None:
    """Offer the blocks at ``places`` of ``chain`` to a lower tier, a stretch at a time."""
    new = [at for at in places if chain[at] not in index]
    for _, stretch in groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
        run = [at for _, at in stretch]
        before = chain[run[0] - 1] if run[0] else None
        index.access([chain[at] for at in run], 0)  # as the disk does
        index.publish(index.reserve([chain[at] for at in run], before)[1])
