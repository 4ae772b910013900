"""Prefetches of a stack: promotions that leave no block pinned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.lower.promotion import LowerTiers, Match
from kvcache.lower.resume_promotion import promote_resume
from kvcache.resume import FrontLookup, GroupKeys
from kvcache.stack.spans import StackSpans
from kvcache.tier import FrontTier


class Prefetcher:
    """Promotes blocks of lower tiers to L1 ahead of their use.

    Args:
        front: L1.
        lower: the lower tiers.
        spans: ends the spans.
        clock: returns seconds.
    """

    def __init__(
        self,
        front: FrontTier,
        lower: LowerTiers,
        spans: StackSpans,
        clock: Callable[[], float],
    ) -> None:
        self._front = front
        self._lower = lower
        self._spans = spans
        self._clock = clock

    def prefetch(
        self, keys: Sequence[bytes], context: Context | None, *, linked: bool = False
    ) -> Future[Match] | None:
        """Promote the longest prefix of ``keys`` that lower tiers hold.

        Args:
            keys: a chain, from its first block.
            context: the caller's trace; ``None`` for the current one.
            linked: whether the span begins a trace of its own, with a link to the caller's.

        Returns:
            a future of the match, done when its blocks are in L1; ``None`` if L1 has all of them
            already or no lower tier can be asked.
        """
        held = self._front.contains(keys) if self._lower.accepts_calls else []
        if all(held):
            return None
        match = Match(keys, 0, held.index(False))
        span = _start_span(context, linked=linked)

        def promote() -> Match:
            found = self._lower.find(match, span)
            if any(found.sources):
                lease = self._lower.promote(found, span)
                lease.end()
                found = replace(found, blocks=len(lease))
            self._spans.end_lookup(span, found)
            return found

        return self._lower.submit(promote)

    def prefetch_resume(
        self,
        groups: Sequence[GroupKeys],
        top: int,
        align_tokens: int,
        context: Context | None,
        *,
        linked: bool = False,
    ) -> Future[Match] | None:
        """Promote what a request needs at the last resume point that the tiers hold."""
        if len(groups) == 1 and groups[0].is_chain:
            [group] = groups
            keys = group.keys(0, group.blocks(top // align_tokens * align_tokens))
            return self.prefetch(keys, context, linked=linked)
        if not self._lower.accepts_calls:
            return None
        own = FrontLookup(self._front, groups, 0, top, align_tokens).tokens
        if own == top // align_tokens * align_tokens:
            return None
        span = _start_span(context, linked=linked)

        def promote() -> Match:
            match, tokens = promote_resume(
                self._lower, groups, own, top, align_tokens, self._clock, span
            )
            self._spans.end_lookup(span, match, tokens)
            return match

        return self._lower.submit(promote)


def _start_span(context: Context | None, *, linked: bool) -> Span:
    if linked:
        return telemetry.start_linked(context, telemetry.PREFETCH)
    return telemetry.start_span(telemetry.PREFETCH, context)
