"""Lookups and loads of a stack that need L1 alone, and so never wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import metrics, telemetry
from kvcache.lower.promotion import Match
from kvcache.resume import GroupKeys, Resume, chain_resume, pin_resume
from kvcache.stack.leases import StackLeases
from kvcache.stack.spans import StackSpans
from kvcache.tier import FrontTier, Lease


class LocalFetcher:
    """Looks up blocks in L1, and pins them for loads.

    Args:
        front: L1.
        leases: turns leases into loads.
        spans: ends the spans.
        timer: records the duration of lookups.
        clock: returns seconds.
    """

    def __init__(
        self,
        front: FrontTier,
        leases: StackLeases,
        spans: StackSpans,
        timer: metrics.Timer,
        clock: Callable[[], float],
    ) -> None:
        self._front = front
        self._leases = leases
        self._spans = spans
        self._timer = timer
        self._clock = clock

    def find(
        self, keys: Sequence[bytes], start: int, context: Context | None
    ) -> tuple[Span, Match]:
        """Look up ``keys[start:]``; the caller ends the span."""
        span, begun = telemetry.start_span(telemetry.LOOKUP, context), self._clock()
        held = self._front.access(keys, start)
        self._timer.record("lookup", self._clock() - begun)
        return span, Match(keys, start, held)

    def pin(self, match: Match, context: Context | None) -> Lease:
        """Pin the blocks of ``match`` that L1 still holds, for a load."""
        lease = self._front.pin(match.held)
        if not match.blocks:
            return lease
        span = telemetry.start_span(telemetry.LOAD, context)
        return self._leases.begin_load(lease, match.blocks, span)

    def fetch_resume(
        self,
        groups: Sequence[GroupKeys],
        own: int,
        top: int,
        align_tokens: int,
        context: Context | None,
    ) -> Resume:
        """Find the last resume point, and pin what it needs, as ``Stack.fetch_resume`` does."""
        if len(groups) == 1 and groups[0].is_chain:
            return self._fetch_chain(groups[0], own, top, align_tokens, context)
        span, begun = telemetry.start_span(telemetry.LOOKUP, context), self._clock()
        found, lease = pin_resume(self._front, groups, own, top, align_tokens)
        self._timer.record("lookup", self._clock() - begun)
        asked = found.asked if span.is_recording() else ()
        self._spans.end_lookup(span, Match(asked, 0, len(lease)), found.tokens - own)
        if lease.keys:
            span = telemetry.start_span(telemetry.LOAD, context)
            lease = self._leases.begin_load(lease, len(lease), span)
        return Resume(found.tokens, lease, found.chain_tokens)

    def _fetch_chain(
        self, group: GroupKeys, own: int, top: int, align_tokens: int, context: Context | None
    ) -> Resume:
        """Do what :meth:`fetch_resume` does, faster, for a request with one chain group."""
        keys = group.keys(0, group.blocks(top // align_tokens * align_tokens))
        start = own // group.block_tokens * group.parts
        span, match = self.find(keys, start, context)
        tokens, end = chain_resume(group, start + match.blocks, own, align_tokens)
        if end < start + match.blocks:
            match = replace(match, blocks=max(0, end - start))
        self._spans.end_lookup(span, match)
        lease = self.pin(match, context)
        if len(lease) < match.blocks:  # another thread has evicted some
            tokens, end = chain_resume(group, start + len(lease), own, align_tokens)
            if len(lease) > max(0, end - start):
                lease.end()
                tokens, lease = own, self._front.pin(())
        return Resume(tokens, lease, tokens)
