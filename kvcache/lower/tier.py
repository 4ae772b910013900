"""A lower tier as the stack uses it: calls with a deadline, and write-behind.

1. The stack calls a tier in two places: ``TierCaller._start_call`` and ``WriteBehind._write``. Both
   have the same deadline, circuit breaker and failure rule: whatever the tier raises or returns, a
   failure is a counted miss or decline, never an exception.
2. A call that misses its deadline continues. Its memory stays under lease until it ends.
3. Loads run before stores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.guards.front_tier import guard_front_tier
from kvcache.lower.caller import PIECE_NBYTES, TierCaller
from kvcache.lower.circuit_breaker import CircuitBreaker
from kvcache.lower.pending_call import PendingCall
from kvcache.lower.write_behind import WriteBehind
from kvcache.sizes import Size
from kvcache.tier import FrontTier, Lease, Tier


class LowerTier(TierCaller):
    """One tier below L1.

    Args:
        tier: the tier.
        name: its name in the profile.
        front: L1; its slots are read and filled.
        namespace: the namespace of the blocks.
        about: a JSON object that describes the namespace to people.
        deadline_s: how long a caller waits for one answer.
        queue: bytes of blocks that may wait to be written; at most a quarter of L1.
        calls: how many calls run in parallel.
        writes: which blocks are written: all that an engine stores, or (``"hot"``) those that are
            used a second time.
        if_slower: whether a request computes or loads blocks for which loading is predicted to take
            longer.
        lookup: whether a lookup asks the tier, or (``"load"``) assumes that the tier holds a block,
            so that the load is the question. Write-behind then asks nothing either.
        announce: whether the tier's blocks are announced to subscribers of the stack's events.
        kind: the tier's kind in the profile; "" is the name of its class.
        clock: the current time in seconds.
        piece_nbytes: the most bytes of one call.
        breaker: the circuit breaker; ``None`` is one with the default settings.

    Raises:
        ValueError: when ``deadline_s`` or ``calls`` is out of range.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        name: str,
        front: FrontTier,
        namespace: bytes,
        about: str = "",
        deadline_s: float = 1.0,
        queue: Size = Size(256 << 20),  # noqa: B008 - a number
        calls: int = 2,
        writes: Literal["all", "hot"] = "all",
        if_slower: Literal["compute", "load"] = "compute",
        lookup: Literal["ask", "load"] = "ask",
        announce: bool = True,
        kind: str = "",
        clock: Callable[[], float] = time.monotonic,
        piece_nbytes: int = PIECE_NBYTES,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        front = guard_front_tier(front)
        super().__init__(
            tier,
            name=name,
            kind=kind,
            namespace=namespace,
            about=about,
            block_nbytes=front.block_nbytes,
            deadline_s=deadline_s,
            calls=calls,
            if_slower=if_slower,
            clock=clock,
            piece_nbytes=piece_nbytes,
            breaker=breaker,
            lookup=lookup,
        )
        self.announce = announce
        wanted, limit = queue // front.block_nbytes, front.slab.slots // 4
        self.write_behind = WriteBehind(
            self.channel,
            front,
            min(wanted, limit),
            only_reused=writes == "hot",
            queue_option=(
                "the tier's queue" if wanted < limit else "L1's capacity (the queue holds 1/4)"
            ),
        )

    @property
    def queued_nbytes(self) -> int:
        """Bytes of the blocks that wait to be written."""
        return self.write_behind.waiting_blocks * self.block_nbytes

    def load(self, lease: Lease, span: Span) -> PendingCall[bool]:
        """Start to fill ``lease`` with the blocks that the tier holds.

        The lease ends when the call ends, however late, or immediately if no call is made. ``span``
        covers all loads from this tier for one request; :meth:`end_load_span` ends it.
        """
        namespace, block_nbytes = self.namespace, self.block_nbytes

        def fill() -> Sequence[bool]:
            missed = lease.keys
            try:
                written = self.channel.load(namespace, lease.keys, lease.views)
                filled = [nbytes == block_nbytes for nbytes in written]
                missed = [key for key, done in zip(lease.keys, filled, strict=True) if not done]
                return filled
            finally:
                loaded = len(lease) - len(missed)
                self._count_loaded(loaded, len(missed), loaded * block_nbytes)
                lease.end(failed=missed)

        return self._start_call(
            "load", fill, len(lease), span, on_cancel=lambda: lease.end(lease.keys)
        )

    def end_load_span(
        self, calls: Sequence[PendingCall[bool]], requested: int, span: Span, *, gave_up: bool
    ) -> None:
        """End the span of one request's loads.

        Args:
            calls: the loads that were started.
            requested: how many blocks the request wanted from this tier.
            span: the span.
            gave_up: whether the request stopped waiting because computing had become faster.
        """
        loaded = sum(call.count_equal(True) for call in calls)
        counts = {
            telemetry.REQUESTED: requested,
            telemetry.HIT: loaded,
            telemetry.PAYLOAD: loaded * self.block_nbytes,
        }
        self._end_span(span, calls, counts, telemetry.SLOWER if gave_up else "")

    def close(self, flush_until: float, close_until: float) -> None:
        """Write the queued blocks and close the tier.

        Args:
            flush_until: when blocks that are still queued are dropped, by ``time.monotonic``.
            close_until: when the tier's own ``close`` has begun at the latest. It may hang.

        Raises:
            TierError: when the tier's ``close`` fails.
        """
        self.write_behind.flush(max(0.0, flush_until - time.monotonic()))
        super().close(flush_until, close_until)
