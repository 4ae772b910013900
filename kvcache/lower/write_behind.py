"""Write-behind: the queue of blocks that an engine stored in L1 and one lower tier lacks.

1. A queued block is pinned in L1. The queue is bounded, so that a slow tier cannot take over L1.
   Back-pressure never reaches the engine: blocks that do not fit are dropped, the tail of a chain
   and its side blocks first.
2. Every stored block is written, known to be held already, declined, dropped, or withheld until its
   second use. The counters of these add up to the stored blocks.
3. A failure of the tier is a decline, never an exception.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.guards.calls import TierError, describe_error
from kvcache.lower.channel import Channel
from kvcache.lower.offer import offer
from kvcache.tier import FrontTier, Lease
from kvcache.worker_pool import STORE

log = logging.getLogger(__name__)

Parents = Mapping[bytes, bytes | None]
"""Keys of blocks, in order, each with the key of its parent."""


class WriteBehind:
    """Writes stored blocks to one lower tier, in threads of its channel.

    Args:
        channel: the channel to the tier.
        front: L1, which holds the blocks to write.
        queue_blocks: the capacity of the queue, in blocks.
        only_reused: withhold each block until it is used a second time (``writes = "hot"``).
        queue_option: the option that enlarges the queue, for the log.
    """

    def __init__(
        self,
        channel: Channel,
        front: FrontTier,
        queue_blocks: int,
        *,
        only_reused: bool,
        queue_option: str,
    ) -> None:
        self.queue_blocks = queue_blocks
        self._channel = channel
        self._front = front
        self._only_reused = only_reused
        self._queue_option = queue_option
        self._full_queue_logged = False
        # The withheld blocks: namespace and parent by key, oldest first. There are at most as many
        # as slots of L1, because a block that has left L1 can no longer be written.
        self.withheld: OrderedDict[bytes, tuple[bytes, bytes | None]] = OrderedDict()
        self._lock = threading.Lock()
        self._queue_empty = threading.Condition(self._lock)
        self.waiting_blocks = 0  # queued, or being written

    def enqueue_stored(self, parents: Parents, namespace: bytes, cause: Span) -> None:
        """Queue or withhold blocks that an engine has stored in L1.

        Args:
            parents: the blocks, READY in L1.
            namespace: the namespace at the time their slots were reserved; a reset may have
                replaced it since.
            cause: the span of the operation that stored them, which has not ended.
        """
        if not self._only_reused:
            self.enqueue(parents, namespace, cause)
            return
        with self._lock:
            self._channel.add_counts(withheld_blocks=len(parents))
            self.withheld.update({key: (namespace, parent) for key, parent in parents.items()})
            while len(self.withheld) > self._front.slab.slots:
                self.withheld.popitem(last=False)

    def enqueue_reused(self, keys: Sequence[bytes], failed: Collection[bytes], cause: Span) -> None:
        """Queue the withheld blocks of ``keys``, which a request has used in L1.

        Args:
            keys: the blocks of a load that has ended.
            failed: the keys of blocks that could not be copied to the engine.
            cause: the span of the load, which has not ended.
        """
        if not self.withheld:
            return
        with self._lock:
            reused = [key for key in keys if key in self.withheld and key not in failed]
            blocks = {key: self.withheld.pop(key) for key in reused}
            self._channel.add_counts(withheld_blocks=-len(blocks))
        for namespace in dict.fromkeys(namespace for namespace, _ in blocks.values()):
            parents = {key: parent for key, (of, parent) in blocks.items() if of == namespace}
            self.enqueue(parents, namespace, cause)

    def enqueue(self, parents: Parents, namespace: bytes, cause: Span) -> None:
        """Queue the blocks for which the queue has room, and drop the others.

        The queued blocks are the leading ones of the chains, with their side blocks. The arguments
        are those of :meth:`enqueue_stored`.
        """
        keys = list(parents)
        if not keys:
            return
        with self._lock:
            accepts_calls = self._channel.accepts_calls
            capacity = self.queue_blocks if accepts_calls else 0
            queued = max(0, min(len(keys), capacity - self.waiting_blocks))
            self.waiting_blocks += queued
            full = queued < len(keys) and accepts_calls
            warn = full and not self._full_queue_logged
            self._full_queue_logged |= warn
        if warn:
            log.warning(
                "kvcache: tier %s: write queue full (it holds %d blocks); %d of %d blocks stored "
                "at once are not written to the tier. Raise %s, or store fewer blocks at once; "
                "later drops are counted, not logged",
                self._channel.tier_name.name, self.queue_blocks, len(keys) - queued, len(keys),
                self._queue_option,
            )  # fmt: skip
        if dropped := len(keys) - queued:
            keys = _most_useful(parents, queued)
            self._channel.add_counts(dropped_blocks=dropped)
            if cause.is_recording():
                event: telemetry.Attributes = {
                    **self._channel.tier_attributes,
                    telemetry.DROPPED: dropped,
                }
                cause.add_event(telemetry.BLOCKS_DROPPED, event)
        for at in range(0, queued, self._channel.blocks_per_call):
            batch = keys[at : min(at + self._channel.blocks_per_call, queued)]
            lease = self._front.pin(batch)
            gone = len(batch) - len(lease)  # L1 dropped them before they could be pinned
            self._channel.add_counts(dropped_blocks=gone)
            self._leave_queue(gone)
            if not lease.keys:
                lease.end()
                continue
            self._channel.workers.add_job(
                STORE,
                partial(self._write_or_drop, lease, parents, namespace, cause),
                partial(self._drop, lease),
            )

    def _drop(self, lease: Lease) -> None:
        """Count the blocks of ``lease`` as dropped, and end it."""
        self._channel.add_counts(dropped_blocks=len(lease))
        lease.end()
        self._leave_queue(len(lease))

    def _write_or_drop(self, lease: Lease, parents: Parents, namespace: bytes, cause: Span) -> None:
        """Write the blocks of ``lease``, unless the tier may not be called; end the lease."""
        reset = namespace != self._channel.namespace  # no stack would look for these blocks
        if reset or self._channel.closed or not self._channel.health.breaker.allow_call():
            self._drop(lease)
            return
        try:
            self._write(lease, parents, namespace, cause)
        finally:
            self._leave_queue(len(lease))  # last, so that flush() returns after all counters

    def _write(self, lease: Lease, parents: Parents, namespace: bytes, cause: Span) -> None:
        """Offer the tier the blocks of ``lease`` that it lacks, and end the lease."""
        span = telemetry.start_linked(cause, telemetry.TIER_STORE)
        begun = self._channel.clock()
        known, stored, error, why = 0, 0, "", ""
        try:
            parents_of_lease = [parents[key] for key in lease.keys]
            with telemetry.use_span(span):
                offered = offer(self._channel, namespace, lease.keys, parents_of_lease, lease.views)
            known, stored = offered.known_blocks, offered.stored_blocks
        except TierError as failure:
            error, why = failure.error, failure.why
        except BaseException as failure:  # noqa: BLE001 - the application's telemetry may raise
            error, why = describe_error(failure)
        finally:
            lease.end()
        seconds = self._channel.clock() - begun
        if not error and seconds > self._channel.deadline_s:
            error, why = "timeout", "it took longer than the deadline"
        self._channel.health.timer.record("store", seconds, error)
        declined = len(lease) - known - stored
        self._channel.add_counts(
            known_blocks=known,
            stored_blocks=stored,
            stored_nbytes=stored * self._front.block_nbytes,
            declined_blocks=declined,
        )
        if error:
            self._channel.health.record_failure("store", error, why, span)
        else:
            self._channel.health.record_success(span)
        telemetry.end_span(
            span,
            {
                **self._channel.tier_attributes,
                telemetry.REQUESTED: len(lease),
                telemetry.STORED: stored,
                telemetry.KNOWN: known,
                telemetry.PAYLOAD: stored * self._front.block_nbytes,
                **({telemetry.FAILED: declined} if declined else {}),
            },
            error=error or None,
        )

    def flush(self, timeout_s: float) -> bool:
        """Wait until the queue is empty; return whether it was within ``timeout_s``."""
        with self._queue_empty:
            return self._queue_empty.wait_for(lambda: not self.waiting_blocks, timeout_s)

    def _leave_queue(self, blocks: int) -> None:
        with self._queue_empty:
            self.waiting_blocks -= blocks
            if not self.waiting_blocks:
                self._queue_empty.notify_all()


def _most_useful(parents: Parents, count: int) -> list[bytes]:
    """Return ``count`` of the keys, in order: the first ones of chains, with their side blocks."""
    children: dict[bytes | None, list[bytes]] = {}
    for key, parent in parents.items():
        children.setdefault(parent if parent in parents else None, []).append(key)
    # A side block comes after the chain in the store; it is taken right after its parent.
    chosen: set[bytes] = set()
    waiting = children.get(None, [])[::-1]
    while len(chosen) < count:
        key = waiting.pop()
        chosen.add(key)
        waiting += children.get(key, ())
    return [key for key in parents if key in chosen]
