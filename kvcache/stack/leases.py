"""Leases of a stack: each has a span that lasts as long, and its end starts write-behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.keys import Branch, parents_of
from kvcache.lower.promotion import LowerTiers
from kvcache.stack.spans import StackSpans
from kvcache.tier import Lease


class StackLeases:
    """Turns leases of L1 into loads and stores.

    Args:
        lower: the tiers to which blocks are written.
        spans: ends the spans.

    Attributes:
        loaded_blocks: how many blocks were loaded without a failure.
    """

    def __init__(self, lower: LowerTiers, spans: StackSpans) -> None:
        self._lower = lower
        self._spans = spans
        self._lock = threading.Lock()
        self.loaded_blocks = 0

    def begin_load(self, lease: Lease, requested: int, span: Span) -> Lease:
        """Return ``lease``, of blocks that were pinned for a load of ``requested`` blocks.

        The end of the lease ends ``span``. It also queues the blocks for write-behind to the tiers
        with ``writes = "hot"`` that do not have them yet.
        """

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            for lower in self._lower.tiers:
                lower.write_behind.enqueue_reused(lease.keys, failed, span)
            with self._lock:
                self.loaded_blocks += len(lease) - len(failed)
            self._spans.end_lease(span, telemetry.HIT, requested, lease, failed)

        lease.span = span
        lease.add_end_callback(ended)
        return lease

    def begin_store(
        self,
        lease: Lease,
        branches: Sequence[Branch],
        namespaces: Sequence[bytes],
        context: Context | None,
    ) -> Lease:
        """Return ``lease``, on slots that were reserved for blocks of ``branches``.

        The end of the lease queues its blocks for write-behind, and ends the span of the store.

        Args:
            lease: the lease, which is not empty.
            branches: the segments.
            namespaces: those of the lower tiers before the blocks were reserved. ``clear`` replaces
                them, and blocks reserved before it must not be written under the new ones.
            context: the parent of the span.
        """
        tiers = self._lower.tiers
        span = telemetry.start_span(telemetry.STORE, context)

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            if namespaces:
                parents = parents_of(branches)
                pairs = zip(lease.keys, lease.positions, strict=True)
                stored = {key: parents[at] for key, at in pairs if key not in failed}
                for lower, namespace in zip(tiers, namespaces, strict=True):
                    lower.write_behind.enqueue_stored(stored, namespace, span)
            requested = sum([len(keys) for keys, _ in branches])
            self._spans.end_lease(span, telemetry.STORED, requested, lease, failed)

        lease.span = span
        lease.add_end_callback(ended)
        return lease
