"""The attributes with which a stack ends the spans of its operations."""

from __future__ import annotations

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.lower.promotion import LowerTiers, Match
from kvcache.tier import Lease


class StackSpans:
    """Ends spans of lookups, loads, stores and prefetches.

    Args:
        profile: the profile's name.
        block_tokens: tokens of a block; 0 if unknown.
        block_nbytes: bytes of a block, of all ranks together.
        lower: the lower tiers.
    """

    def __init__(
        self, profile: str, block_tokens: int, block_nbytes: int, lower: LowerTiers
    ) -> None:
        self._profile = profile
        self._block_tokens = block_tokens
        self._block_nbytes = block_nbytes
        self._lower = lower

    def end_lookup(
        self, span: Span, match: Match, tokens: int | None = None, *, loaded: bool = True
    ) -> None:
        """End the span of a lookup or prefetch.

        Args:
            span: the span.
            match: what was found.
            tokens: the tokens of the hit; ``None`` if ``match`` has all of its blocks.
            loaded: whether the blocks of lower tiers were loaded. Otherwise those of a tier with
                ``lookup = "load"`` are assumed, and are no hits.
        """
        if not span.is_recording():  # spares counting the blocks of every lookup
            return
        requested = len(match.keys) - match.start
        breaker_open = (
            self._lower.tiers and match.blocks < requested and not self._lower.accepts_calls
        )
        assumed = 0 if loaded else self._lower.count_assumed(match)
        hits = match.blocks - assumed
        if tokens is None:
            tokens = hits * self._block_tokens
        telemetry.end_span(
            span,
            {
                telemetry.PROFILE: self._profile,
                telemetry.REQUESTED: requested,
                telemetry.HIT: hits,
                **({telemetry.ASSUMED: assumed} if assumed else {}),
                telemetry.L1_HIT: match.sources.count(0) if match.sources else match.blocks,
                **({telemetry.HIT_TOKENS: tokens} if self._block_tokens else {}),
                **({telemetry.SKIP_REASON: telemetry.BREAKER_OPEN} if breaker_open else {}),
            },
        )

    def end_lease(
        self, span: Span, outcome: str, requested: int, lease: Lease, failed: frozenset[bytes]
    ) -> None:
        """End the span of a load or a store after its lease has ended.

        Args:
            span: the span.
            outcome: the attribute that counts the copied blocks.
            requested: how many blocks were to be copied.
            lease: the lease.
            failed: its failed keys.
        """
        succeeded = len(lease.keys) - len(failed)
        telemetry.end_span(
            span,
            {
                telemetry.PROFILE: self._profile,
                telemetry.REQUESTED: requested,
                outcome: succeeded,
                telemetry.PAYLOAD: succeeded * self._block_nbytes,
                **({telemetry.FAILED: len(failed)} if failed else {}),
                **({telemetry.EVICTED: lease.evicted} if lease.evicted else {}),
            },
            error="copy_failed" if failed else None,
        )
