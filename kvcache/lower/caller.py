"""Calls of one lower tier with a deadline, for an engine with an L1 and for one without.

1. Whatever the tier raises or returns, a failure is a counted miss or decline, never an exception.
2. A call that misses its deadline continues.
3. The durations of lookups and loads are measured, to compare them with computing.
4. A block's name in the tier is its namespace and its key, joined. A reset moves the caller to a
   new random namespace, so that it finds no earlier block. The tier then forgets the earlier
   namespace, so that no later stack finds one either, however the process ends; this holds once
   ``finish_clear`` has returned ``True``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import Final, Literal, TypeVar

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.lower.channel import Channel
from kvcache.lower.circuit_breaker import CircuitBreaker
from kvcache.lower.latency import LatencyModel
from kvcache.lower.pending_call import PendingCall
from kvcache.process import bind_to_process
from kvcache.stats import LowerStats
from kvcache.tier import Tier
from kvcache.worker_pool import LOAD

log = logging.getLogger(__name__)

T = TypeVar("T")

PIECE_NBYTES: Final = 16 << 20
"""The most bytes of one call. It bounds the time that a load waits for a running store."""

REMEASURE_S: Final = 5.0
"""How often a skipped tier is read anyway, to measure whether it is still slower than computing."""

_MAX_DEADLINE_S: Final = 3600
_MAX_CALLS: Final = 1024


class TierCaller:
    """Calls one lower tier.

    Args:
        tier: the tier.
        name: its name in the profile.
        kind: the tier's kind in the profile; "" is the name of its class.
        namespace: the namespace of the blocks.
        about: a JSON object that describes the namespace to people.
        block_nbytes: bytes of the largest block.
        deadline_s: how long a caller waits for one answer.
        calls: how many calls run in parallel.
        if_slower: whether a request computes or loads blocks for which loading is predicted to take
            longer.
        clock: the current time in seconds.
        piece_nbytes: the most bytes of one call.
        breaker: the circuit breaker; ``None`` is one with the default settings.
        lookup: whether a lookup asks the tier, or (``"load"``) assumes that the tier holds a block.

    Raises:
        ValueError: when ``deadline_s`` or ``calls`` is out of range.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        name: str,
        kind: str,
        namespace: bytes,
        about: str,
        block_nbytes: int,
        deadline_s: float,
        calls: int,
        if_slower: Literal["compute", "load"],
        clock: Callable[[], float],
        piece_nbytes: int,
        breaker: CircuitBreaker | None,
        lookup: Literal["ask", "load"],
    ) -> None:
        if not 0 < deadline_s <= _MAX_DEADLINE_S:  # also refuses nan
            raise ValueError(
                f"deadline_s is {deadline_s}; it must be above 0 and at most {_MAX_DEADLINE_S} s"
            )
        if not 1 <= calls <= _MAX_CALLS:
            raise ValueError(f"calls is {calls}; it must be 1 to {_MAX_CALLS}")
        self.name = name
        self.block_nbytes = block_nbytes
        self.loads_even_if_slower = if_slower == "load"
        self.channel = Channel(
            tier,
            name=name,
            kind=kind or type(tier).__name__,
            namespace=namespace,
            about=about,
            deadline_s=deadline_s,
            blocks_per_call=max(1, piece_nbytes // block_nbytes),
            calls=calls,
            clock=clock,
            breaker=breaker,
            lookup=lookup,
        )
        self._lookup_latency, self._load_latency = LatencyModel(), LatencyModel()
        self._lock = threading.Lock()
        self._remeasured_at = 0.0  # when ``claim_remeasure`` last returned True
        bind_to_process(self)

    @property
    def namespace(self) -> bytes:
        """The namespace of blocks that are looked up and stored now."""
        return self.channel.namespace

    @property
    def queued_nbytes(self) -> int:
        """Bytes of the blocks that wait to be written."""
        return 0

    def contains(self, keys: Sequence[bytes], parent_span: Span) -> list[bool]:
        """Return which of ``keys`` the tier reports to hold; none if it does not answer.

        With ``lookup = "load"`` the answer is an assumption, and the tier is not called.
        """
        namespace = self.namespace
        if self.channel.assumes_held:
            return self._assume_held(keys, parent_span)
        span = telemetry.start_child(parent_span, telemetry.TIER_CONTAINS)
        begun = self.channel.clock()
        call = self._start_call(
            "contains",
            lambda: self.channel.contains(namespace, keys),
            len(keys),
            span,
            on_cancel=lambda: None,
        )
        answers = call.wait()
        held = [False] * len(keys)
        if answers is not None:
            held = list(answers)
            self._lookup_latency.observe(len(keys), self.channel.clock() - begun)
        self.channel.add_counts(lookup_blocks=len(keys), hit_blocks=sum(held))
        self._end_span(span, [call], {telemetry.REQUESTED: len(keys), telemetry.HIT: sum(held)})
        return held

    def _assume_held(self, keys: Sequence[bytes], parent_span: Span) -> list[bool]:
        """Return which of ``keys`` are worth a load; none while the circuit breaker is open."""
        if not self.channel.accepts_calls:
            span = telemetry.start_child(parent_span, telemetry.TIER_LOAD)
            counts = {telemetry.REQUESTED: len(keys), telemetry.HIT: 0}
            self._end_span(span, (), counts, telemetry.BREAKER_OPEN)
        return self.channel.may_hold(self.namespace, keys)

    def _count_loaded(self, loaded: int, missed: int, loaded_nbytes: int) -> None:
        """Count a load. Where a lookup only assumes, the load is the lookup."""
        counts = {"loaded_blocks": loaded, "loaded_nbytes": loaded_nbytes}
        if self.channel.assumes_held:
            counts |= {"lookup_blocks": loaded + missed, "hit_blocks": loaded}
        else:
            counts["missed_blocks"] = missed
        self.channel.add_counts(**counts)

    def _start_call(
        self,
        operation: str,
        call: Callable[[], Sequence[T]],
        answer_count: int,
        span: Span,
        *,
        on_cancel: Callable[[], None],
        priority: int = LOAD,
        queue_counts: bool = True,
    ) -> PendingCall[T]:
        """Queue ``call`` for a worker, or cancel it if the tier may not be called."""
        pending: PendingCall[T] = PendingCall(
            self.channel.health,
            self.channel.deadline_s,
            operation,
            answer_count,
            on_cancel,
            span,
            queue_counts=queue_counts,
        )
        if self.channel.closed or not self.channel.health.breaker.allow_call():
            pending.cancel()
        else:
            self.channel.workers.add_job(priority, lambda: pending.run(call), pending.cancel)
        return pending

    def _end_span(
        self,
        span: Span,
        calls: Sequence[PendingCall[T]],
        counts: Mapping[str, int],
        skip_reason: str = "",
    ) -> None:
        """End the span of ``calls`` to the tier."""
        if not span.is_recording():
            return
        errors = [call.error for call in calls if call.error]
        if any(call.future.cancelled() and not call.error for call in calls):
            skip_reason = telemetry.BREAKER_OPEN
        telemetry.end_span(
            span,
            {
                **self.channel.tier_attributes,
                **counts,
                telemetry.QUEUED: max((call.queued_s for call in calls), default=0.0),
                **({telemetry.SKIP_REASON: skip_reason} if skip_reason else {}),
            },
            error=errors[0] if errors else None,
        )

    # Whether the tier is worth a call

    def observe_load(self, calls: Sequence[PendingCall[bool]], seconds: float) -> None:
        """Add a sample to the load latency: ``calls`` took ``seconds`` from first to last."""
        requested = sum(call.answer_count for call in calls)
        loaded = sum(call.count_equal(True) for call in calls)
        hanging = not all(call.future.done() for call in calls)
        # A load with misses says nothing about the speed, because a miss returns early. Where the
        # load is the lookup, a miss that takes longer than a load of all blocks should does.
        slow = self.channel.assumes_held and seconds > self.load_seconds(requested)
        if requested and (loaded == requested or hanging or slow):
            self._load_latency.observe(requested, seconds)

    def lookup_seconds(self, blocks: int) -> float:
        """Predict, optimistically, how long a lookup of ``blocks`` takes.

        Returns 0 while nothing was measured, and always for ``if_slower = "load"`` and
        ``lookup = "load"``.
        """
        if self.loads_even_if_slower:
            return 0.0
        return self._lookup_latency.optimistic(blocks) or 0.0

    def load_seconds(self, blocks: int) -> float:
        """Predict how long a load of ``blocks`` takes, as :meth:`lookup_seconds` does."""
        if self.loads_even_if_slower:
            return 0.0
        return self._load_latency.optimistic(blocks) or 0.0

    def record_skip(self, span_name: str, blocks: int, parent_span: Span) -> None:
        """Count and trace ``blocks`` for which computing is faster than a call to this tier.

        ``span_name`` is that of the skipped call.
        """
        self.channel.add_counts(skipped_blocks=blocks)
        if parent_span.is_recording():
            attributes: telemetry.Attributes = {
                telemetry.SKIPPED: blocks,
                telemetry.SKIP_REASON: telemetry.SLOWER,
            }
            parent_span.set_attributes(attributes)
            span = telemetry.start_child(parent_span, span_name)
            telemetry.end_span(span, {**self.channel.tier_attributes, **attributes})

    def claim_remeasure(self) -> bool:
        """Return whether to read the skipped tier now, to measure it again.

        Returns ``True`` to one caller every ``REMEASURE_S`` seconds.
        """
        with self._lock:
            now = self.channel.clock()
            due = now - self._remeasured_at >= REMEASURE_S
            if due:
                self._remeasured_at = now
            return due

    # Reset, counters

    def start_clear(self, namespace: bytes | None = None) -> PendingCall[bool]:
        """Reset the namespace, and start to have the tier forget the earlier one.

        :meth:`finish_clear` takes the result. ``namespace`` is the next one; ``None`` is random.
        """
        self.channel.reset(namespace)
        return self._start_call(
            "forget",
            lambda: [self.channel.tier_namespace.forget()],
            1,
            INVALID_SPAN,
            on_cancel=lambda: None,
        )

    def finish_clear(self, call: PendingCall[bool]) -> bool:
        """Wait for ``call`` of :meth:`start_clear`; return whether the tier forgot the blocks.

        If not, a warning is logged, and the next writes ask the tier again.
        """
        if call.wait() == [True] or not self.channel.tier_namespace.forget_pending:
            return True
        log.warning(
            "kvcache: tier %s: a reset was not written (%s); an engine that starts later may find "
            "blocks from before the reset",
            self.name,
            call.error or ("not called" if call.future.cancelled() else "not supported"),
        )
        return False

    def stats(self) -> LowerStats:
        """Return the counters now."""
        own = {"block_nbytes": self.block_nbytes, "queued_nbytes": self.queued_nbytes}
        return LowerStats(**(self.channel.counts() | own))

    def close(self, flush_until: float, close_until: float) -> None:
        """Close the tier.

        Args:
            flush_until: when queued writes are dropped, by ``time.monotonic``.
            close_until: when the tier's own ``close`` has begun at the latest. It may hang.

        Raises:
            TierError: when the tier's ``close`` fails.
        """
        self.channel.close(max(0.0, close_until - time.monotonic()))


def close_tiers(tiers: Sequence[TierCaller], flush_until: float, close_until: float) -> None:
    """Close all tiers at the same time, as :meth:`TierCaller.close` does; raise nothing.

    A tier that still hangs at ``close_until`` is left open, and its memory is not freed.
    """
    closing = [
        tier.channel.control_worker.submit(tier.close, flush_until, close_until) for tier in tiers
    ]
    wait(closing, close_until - time.monotonic())
    for tier, closed in zip(tiers, closing, strict=True):
        if not closed.done():
            log.warning("kvcache: tier %s: close hangs; it is left open", tier.name)
        elif not closed.cancelled() and (error := closed.exception()):
            log.warning("kvcache: tier %s: close failed (%s)", tier.name, error)
