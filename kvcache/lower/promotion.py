"""Promotion: which lower tier holds a block, whether to wait for it, and copying it to L1.

1. A promoted prefix ends before the first block that could not be loaded.
2. Blocks are promoted if, by the durations measured so far, loading is faster than computing. Until
   both are measured, blocks are promoted, which measures loading.
3. A request waits for a promotion at most as long as computing the blocks would take, if that is
   known, and for each call at most until the tier's deadline.
4. A tier that is slower than computing is still read every few seconds, in the background, to
   notice when it becomes faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final, TypeVar

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.lower.block_reads import BlockReads, WantedBlocks
from kvcache.lower.caller import close_tiers
from kvcache.lower.latency import ComputeModel
from kvcache.lower.search import blocks_worth_loading, locate_blocks, runs_by_source
from kvcache.lower.tier import LowerTier
from kvcache.process import bind_to_process
from kvcache.tier import FrontTier, Lease
from kvcache.worker_pool import WorkerPool

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_TIMEOUT_S: Final = 2.0
"""For closing all lower tiers, after their write queues were flushed."""

_WAITING_THREADS = 8


@dataclass(frozen=True, slots=True)
class Match:
    """The tiers hold the first ``blocks`` blocks of ``keys[start:]``."""

    keys: Sequence[bytes]
    start: int
    blocks: int
    sources: tuple[int, ...] = ()  # the tier of each held block, 0 for L1; empty: all are in L1

    @property
    def held(self) -> Sequence[bytes]:
        """The keys of the held blocks."""
        return self.keys[self.start : self.start + self.blocks]


class LowerTiers:
    """The lower tiers of a stack, nearest first.

    Args:
        front: L1.
        tiers: the lower tiers.
        clock: the current time in seconds.

    Attributes:
        reads: the reads of blocks.
        compute_model: predicts how long the engine computes blocks.
    """

    def __init__(
        self,
        front: FrontTier,
        tiers: Sequence[LowerTier],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tiers = tuple(tiers)
        self._front = front
        self._clock = clock
        # Threads that wait for lower tiers. All start now, because a process that is exiting cannot
        # start threads.
        self._waiters = WorkerPool("stack", _WAITING_THREADS if tiers else 0)
        self.reads = BlockReads(front, self.tiers, clock, self.submit)
        self.compute_model = ComputeModel()
        bind_to_process(self)

    @property
    def accepts_calls(self) -> bool:
        """Whether any lower tier would be called now."""
        return any(tier.channel.accepts_calls for tier in self.tiers)

    @property
    def namespaces(self) -> list[bytes]:
        """The namespace of each lower tier."""
        return [tier.namespace for tier in self.tiers]

    def submit(self, call: Callable[..., T], *arguments: object) -> Future[T]:
        """Run ``call`` in a thread that may wait for tiers; cancelled after ``close``."""
        return self._waiters.submit(call, *arguments)

    def close(self, flush_s: float) -> None:
        """Flush the write queues for ``flush_s`` at most, and close all tiers at the same time.

        All tiers together then have :data:`CLOSE_TIMEOUT_S` to close. A tier that still hangs is
        left open, and its memory is not freed.
        """
        flush_until = time.monotonic() + flush_s
        close_until = flush_until + CLOSE_TIMEOUT_S
        close_tiers(self.tiers, flush_until, close_until)
        self._waiters.drop_queued()
        self._waiters.close(max(0.0, close_until - time.monotonic()))
        for tier in self.tiers:
            tier.channel.control_worker.close(max(0.0, close_until - time.monotonic()))

    # Lookup

    def find(self, match: Match, span: Span) -> Match:
        """Extend L1's ``match`` by the blocks of lower tiers that are worth promoting."""
        depth = match.start + match.blocks
        rest = match.keys[depth:]

        def compute_s(blocks: int) -> float | None:
            return self.compute_model.pessimistic(blocks, depth)

        sources = self.locate(rest, compute_s, span)
        found = leading_sources(sources)
        worth = blocks_worth_loading(self.tiers, found, self.compute_model, depth)
        for source, at, end in runs_by_source(found, worth):
            if source:
                self._skip_chain(self.tiers[source - 1], telemetry.TIER_LOAD, rest[at:end], span)
        blocks = match.blocks + worth
        return Match(match.keys, match.start, blocks, (*(0,) * match.blocks, *found[:worth]))

    def count_assumed(self, match: Match) -> int:
        """Return how many blocks of ``match`` a tier may hold, but was not asked for."""
        sources = match.sources[: match.blocks]
        return sum(
            sources.count(number)
            for number, tier in enumerate(self.tiers, 1)
            if tier.channel.assumes_held
        )

    def has_missed(self, wanted: WantedBlocks) -> bool:
        """Return whether a tier that was assumed to hold a wanted block has missed it since."""
        for number, tier in enumerate(self.tiers, 1):
            if tier.channel.assumes_held and number in wanted.sources:
                keys = wanted.of_source(number, len(wanted.keys)).keys
                if not all(tier.channel.remembered.may_hold(tier.namespace, keys)):
                    return True
        return False

    def count_front_prefix(self, keys: Sequence[bytes]) -> int:
        """Return how many leading blocks of ``keys`` L1 holds."""
        return self._front.count_prefix(keys)

    def locate(
        self,
        keys: Sequence[bytes],
        compute_s: Callable[[int], float | None],
        span: Span,
        *,
        sides: bool = False,
    ) -> list[int | None]:
        """Return for each key the nearest tier that holds its block, 0 for L1; ``None`` for none.

        A tier is not asked if its lookup takes longer than to compute the blocks.

        Args:
            keys: of the blocks.
            compute_s: predicts how long the engine computes what a number of these keys saves;
                ``None`` if that is unknown.
            span: the parent of the tiers' spans.
            sides: whether the keys are of side blocks.
        """
        sources: list[int | None] = [0 if held else None for held in self._front.contains(keys)]

        def on_skip(tier: LowerTier, asked: Sequence[bytes]) -> None:
            if sides:
                measure = partial(tier.contains, asked, INVALID_SPAN)
                self.skip(tier, telemetry.TIER_CONTAINS, len(asked), span, measure)
            else:
                self._skip_chain(tier, telemetry.TIER_CONTAINS, asked, span)

        locate_blocks(self.tiers, keys, sources, compute_s, span, on_skip)
        return sources

    def skip(
        self,
        tier: LowerTier,
        span_name: str,
        blocks: int,
        span: Span,
        measure: Callable[[], object],
    ) -> None:
        """Have the engine compute ``blocks``; call ``measure`` in a thread if that is due."""
        tier.record_skip(span_name, blocks, span)
        if tier.claim_remeasure():
            self.submit(measure)

    def _skip_chain(
        self, tier: LowerTier, span_name: str, keys: Sequence[bytes], span: Span
    ) -> None:
        measured = keys[: tier.channel.blocks_per_call]
        self.skip(tier, span_name, len(keys), span, partial(self._remeasure, tier, measured))

    def _remeasure(self, tier: LowerTier, keys: Sequence[bytes]) -> None:
        """Promote the leading ``keys`` that ``tier`` holds, to measure how long it takes."""
        blocks = _first_none([held or None for held in tier.contains(keys, INVALID_SPAN)])
        source = self.tiers.index(tier) + 1
        match = Match(keys, 0, blocks, (source,) * blocks)
        self.promote(match, INVALID_SPAN, patience_s=inf).end()

    # Promotion

    def promote(self, match: Match, span: Span, patience_s: float | None = None) -> Lease:
        """Copy the blocks of ``match`` that L1 lacks to L1, and pin the prefix that L1 then holds.

        Args:
            match: a result of :meth:`find`.
            span: the parent of the tiers' spans.
            patience_s: how long to wait; ``None`` is as long as computing would take.
        """
        until = self._clock() + (self._patience_s(match) if patience_s is None else patience_s)
        return self.reads.read(WantedBlocks.of_chain(match.held, match.sources), until, span)

    def _patience_s(self, match: Match) -> float:
        """Return how long computing the blocks of lower tiers would take; infinity if unknown."""
        tiers = {self.tiers[source - 1] for source in match.sources if source}
        blocks = sum(map(bool, match.sources))
        compute_s = self.compute_model.pessimistic(blocks, match.start + match.blocks - blocks)
        if compute_s is None or any(tier.loads_even_if_slower for tier in tiers):
            return inf
        return compute_s


def leading_sources(sources: Sequence[int | None]) -> list[int]:
    """Return the leading ``sources`` that are not ``None``."""
    return [source for source in sources[: _first_none(sources)] if source is not None]


def _first_none(values: Sequence[object]) -> int:
    """Return the position of the first ``None``, or the length."""
    return next((at for at, value in enumerate(values) if value is None), len(values))
