"""Replays a trace with the calls of a live stack, on live indexes, for blocks without bytes.

For each request, the calls that an engine's connector makes if one step computes the request::

    lower tiers:  contains; blocks that continue L1's prefix are promoted, up to the first gap
    L1:           access(chain), then reserve and publish of the missing blocks; then the hint
    lower tiers:  each is offered the blocks that L1 stored and that it does not hold

Invariants:

* Indexes and policies are those of ``kvcache.index`` and ``kvcache.eviction``; their clock is the
  trace's.
* A block is a hit of the tier that held it before the request; L1 comes first.
* No block is ever late, skipped, dropped or damaged: a replay measures the policy, not the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from sys import maxsize
from typing import TypeVar

from kvcache.eviction import Policy, policy_class
from kvcache.index import Index
from kvcache.replay.trace import Trace

PROGRESS_REQUESTS = 256
"""Requests between two calls of ``progress``: rare enough to cost nothing."""

Request = TypeVar("Request")


def reported(requests: Iterable[Request], progress: Callable[[int], None]) -> Iterator[Request]:
    """Yield ``requests``, and call ``progress`` with how many were taken since its last call."""
    taken = 0
    for request in requests:
        yield request
        taken += 1
        if taken == PROGRESS_REQUESTS:
            progress(taken)
            taken = 0
    progress(taken)


@dataclass(frozen=True, slots=True)
class TierOutcome:
    """The counts of one tier, in blocks.

    Attributes:
        capacity_blocks: blocks that the tier can hold.
        hit_blocks: blocks found in this tier, and in no tier above it.
        read_blocks: blocks copied out of it: from L1 to the engine, from a lower tier to L1.
        written_blocks: blocks stored.
        evicted_blocks: blocks evicted.
        declined_blocks: blocks not stored, because the policy found other blocks worth more or
            there was no room.
    """

    capacity_blocks: int
    hit_blocks: int
    read_blocks: int
    written_blocks: int
    evicted_blocks: int
    declined_blocks: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one policy over a trace.

    Attributes:
        policy: its name.
        tiers: one outcome for each tier, L1 first.
        requests: requests of the trace.
        block_accesses: blocks that all requests looked up.
        prompt_tokens: tokens of all prompts.
        hit_tokens: prompt tokens in the blocks found.
        cpu_s: processor time of the indexes and the policy.
    """

    policy: str
    tiers: tuple[TierOutcome, ...]
    requests: int
    block_accesses: int
    prompt_tokens: int
    hit_tokens: int
    cpu_s: float

    @property
    def hit_blocks(self) -> int:
        """Blocks found in any tier."""
        return sum(tier.hit_blocks for tier in self.tiers)

    @property
    def us_per_block(self) -> float:
        """Microseconds of processor time for each block looked up."""
        return self.cpu_s / max(1, self.block_accesses) * 1e6


def replay(
    trace: Trace,
    policy: str,
    capacities: Sequence[int],
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Replay ``trace``.

    Args:
        trace: the requests.
        policy: name or class path of the policy of every tier.
        capacities: blocks of each tier, L1 first.
        progress: called from time to time with the number of requests replayed since its last call.
    """
    tiers = SimulatedTiers(policy_class(policy), capacities)
    requests = zip(trace.times_s, trace.tokens, trace.keys(), trace.done, strict=True)
    hit_tokens = 0
    start_s = time.process_time()
    for now, tokens, chain, done in reported(requests, progress):
        found = tiers.request(chain, now)
        if done < len(chain):
            tiers.front.mark_done(chain[done:])
        hit_tokens += min(found * trace.block_tokens, tokens)
    cpu_s = time.process_time() - start_s
    return Outcome(
        policy=policy,
        tiers=tiers.outcomes(),
        requests=len(trace),
        block_accesses=len(trace.blocks),
        prompt_tokens=sum(trace.tokens),
        hit_tokens=hit_tokens,
        cpu_s=cpu_s,
    )


class SimulatedTiers:
    """An index for each tier.

    Args:
        policy: makes the policy of a tier from its capacity.
        capacities: blocks of each tier, L1 first.
        step_blocks: blocks that the engine stores in L1 per step; the default is a whole request.

    Attributes:
        front: the index of L1.
        lower: the indexes of the lower tiers.
    """

    def __init__(
        self,
        policy: Callable[[int], Policy],
        capacities: Sequence[int],
        step_blocks: int = maxsize,
    ) -> None:
        self._now = 0.0
        indexes = [Index(policy(capacity), lambda: self._now) for capacity in capacities]
        for index, capacity in zip(indexes, capacities, strict=True):
            index.open_slots(capacity)
        indexes[0].admission = len(indexes) == 1  # a block that L1 declines would reach no tier
        self.front, *self.lower = indexes
        self._step_blocks = step_blocks
        # By tier: blocks found in it and in no tier above, and blocks read from it.
        self._hits = [0] * len(indexes)
        self._reads = [0] * len(indexes)

    def request(self, chain: list[bytes], now: float) -> int:
        """Serve a request: look ``chain`` up and store the missing blocks.

        Returns:
            the number of leading blocks that were found in any tier.
        """
        self._now = now
        front, step = self.front, self._step_blocks
        sources = self._promote(chain) if self.lower else []
        found = front.access(chain, 0)
        self._reads[0] += found
        for source in range(1, len(self._hits)):
            promoted = sources[:found].count(source)
            self._hits[source] += promoted
            self._hits[0] -= promoted
        self._hits[0] += found
        for at in range(found, len(chain), step):
            positions, slots = front.reserve(chain[at : at + step], chain[at - 1] if at else None)
            front.publish(slots)
            for index in self.lower:
                _write(index, chain, [at + position for position in positions])
        return found

    def _promote(self, chain: list[bytes]) -> list[int]:
        """Promote blocks of lower tiers to L1.

        Returns:
            for each leading block that any tier holds, the number of the first tier that held it.
        """
        front, sources = self.front, self._sources(chain)
        if not any(sources):
            return sources
        at = 0
        for source, blocks in groupby(sources):
            end = at + sum(1 for _ in blocks)
            if source:
                keys = chain[at:end]
                positions, slots = front.reserve(keys, chain[at - 1] if at else None)
                front.publish(slots)
                self._reads[source] += len(slots)
                for position in reversed(positions):  # the disk tier reads block by block
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

    def outcomes(self) -> tuple[TierOutcome, ...]:
        """Return the counts of each tier so far, L1 first."""
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


def _write(index: Index, chain: list[bytes], positions: Sequence[int]) -> None:
    """Offer the blocks at ``positions`` of ``chain`` to a lower tier, a segment at a time."""
    new = [at for at in positions if chain[at] not in index]
    for _, segment in groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
        places = [at for _, at in segment]
        keys, parent = [chain[at] for at in places], chain[places[0] - 1] if places[0] else None
        index.access(keys, 0)  # the disk tier counts a write as a use
        index.publish(index.reserve(keys, parent)[1])
