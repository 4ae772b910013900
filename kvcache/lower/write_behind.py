"""What an engine stored, on its way to one lower tier, behind the engine's back.

1. What waits to be written is pinned in L1 and bounded in bytes: a slow tier may not take L1 from
   those who use it. What does not fit is dropped, the tail of a chain first.
2. Every block that was stored is written, known to be there, declined, dropped, or kept back until
   it is used a second time; the counts of these add up to what was stored.
3. Whatever a tier does wrong is a decline, never an exception.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.guards.calls import TierError, describe_error
from kvcache.lower.channel import Channel
from kvcache.lower.worker_pool import STORE
from kvcache.tier import FrontTier, Lease

log = logging.getLogger(__name__)

Parents = Mapping[bytes, bytes | None]
"""Blocks by key, in order, each with the key that it continues."""


class WriteBehind:
    """The queue before one lower tier.

    Args:
        link: to the tier.
        front: the L1 whose slots are read.
        queue_blocks: how many may wait.
        enlarge: the option that gives the queue more room, for the log.
        hot: whether only what is used again is written.
    """

    def __init__(
        self,
        link: Channel,
        front: FrontTier,
        queue_blocks: int,
        *,
        hot: bool,
        enlarge: str,
    ) -> None:
        self.queue_blocks = queue_blocks
        self._channel = link
        self._front = front
        self._hot = hot
        self._enlarge = enlarge
        self._warned = False  # of a full queue
        # Where only what is used again is written: the others, their namespace and parent. As many
        # as L1 has slots: what has left L1 cannot be written any more.
        self._once: OrderedDict[bytes, tuple[bytes, bytes | None]] = OrderedDict()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self.waiting_blocks = 0

    def stored(self, parents: Parents, namespace: bytes, cause: Span) -> None:
        """An engine stored blocks, whose slots were reserved when the namespace was ``namespace``.

        This and the others below get the span that is the ``cause``, which has not ended.
        """
        if not self._hot:
            self.write(parents, namespace, cause)
            return
        with self._lock:
            self._channel.count(withheld_blocks=len(parents))
            self._once.update({key: (namespace, parent) for key, parent in parents.items()})
            while len(self._once) > self._front.slab.slots:
                self._once.popitem(last=False)

    def used(self, keys: Sequence[bytes], failed: Collection[bytes], cause: Span) -> None:
        """``keys`` but for ``failed`` were used, READY in L1: what was kept back is written now."""
        if not self._once:
            return
        with self._lock:
            good = [key for key in keys if key in self._once and key not in failed]
            kept = {key: self._once.pop(key) for key in good}
            self._channel.count(withheld_blocks=-len(kept))
        for namespace in dict.fromkeys(namespace for namespace, _ in kept.values()):
            its = {key: parent for key, (of, parent) in kept.items() if of == namespace}
            self.write(its, namespace, cause)

    def write(self, parents: Parents, namespace: bytes, cause: Span) -> None:
        """Queue blocks, READY in L1, to be written: as many of the first as there is room for.

        ``namespace`` is the namespace when their slots were reserved: it may be another by now.
        """
        keys = list(parents)
        if not keys:
            return
        with self._lock:
            skipped = self._channel.asleep or self._channel.closed
            room = 0 if skipped else self.queue_blocks
            taken = max(0, min(len(keys), room - self.waiting_blocks))
            self.waiting_blocks += taken
            warn = taken < len(keys) and not skipped and not self._warned
            self._warned |= warn
        if warn:
            log.warning(
                "kvcache: tier %s: write queue full (it holds %d blocks); %d of %d blocks stored "
                "at once are not written to the tier. Raise %s, or store fewer blocks at once; "
                "later drops are counted, not logged",
                self._channel.named.name, self.queue_blocks, len(keys) - taken, len(keys),
                self._enlarge,
            )  # fmt: skip
        if dropped := len(keys) - taken:
            self._channel.count(dropped_blocks=dropped)
            if cause.is_recording():
                event: telemetry.Attributes = {**self._channel.whose, telemetry.DROPPED: dropped}
                cause.add_event(telemetry.BLOCKS_DROPPED, event)
        for at in range(0, taken, self._channel.blocks_per_call):
            piece = keys[at : min(at + self._channel.blocks_per_call, taken)]
            lease = self._front.pin(piece)
            gone = len(piece) - len(lease)  # dropped from L1 as not to be trusted
            self._channel.count(dropped_blocks=gone)
            self._written(gone)
            self._channel.calls.put(
                STORE,
                partial(self._store, lease, parents, namespace, cause),
                partial(self._drop, lease),
            )

    def _drop(self, lease: Lease) -> None:
        """Do not offer the blocks under ``lease``, and end it."""
        self._channel.count(dropped_blocks=len(lease))
        lease.end()
        self._written(len(lease))

    def _store(self, lease: Lease, parents: Parents, namespace: bytes, cause: Span) -> None:
        """Offer what is new to the tier of the blocks under ``lease``, and end it."""
        # Of another namespace: before a clear, and of no use to anyone.
        stale = namespace != self._channel.namespace
        if stale or self._channel.closed or not self._channel.health.breaker.allows():
            self._drop(lease)
            return
        try:
            self._offer(lease, parents, namespace, cause)
        finally:
            self._written(len(lease))  # last: a waiter for that finds all counts

    def _offer(self, lease: Lease, parents: Parents, namespace: bytes, cause: Span) -> None:
        span, begun = telemetry.start_linked(cause, telemetry.TIER_STORE), self._channel.clock()
        new, stored, error, why = len(lease), 0, "", ""
        try:
            views = dict(zip(lease.keys, lease.views, strict=True))
            with telemetry.use_span(span):
                with suppress(TierError):  # said when it failed first; costs no block
                    self._channel.spaces.forget()
                held = self._channel.contains(namespace, lease.keys)
                unknown = [key for key, known in zip(lease.keys, held, strict=True) if not known]
                for stretch in _stretches(unknown, parents):
                    blocks = [views[key] for key in stretch]
                    stored += sum(
                        self._channel.store(namespace, stretch, blocks, parents[stretch[0]])
                    )
            new = len(unknown)
        except TierError as failure:
            error, why = failure.error, failure.why
        except BaseException as wrong:  # noqa: BLE001 - the application's telemetry may raise
            error, why = describe_error(wrong)
        finally:
            lease.end()
        took = self._channel.clock() - begun
        if not error and took > self._channel.deadline_s:
            error, why = "timeout", "it took longer than the deadline"
        self._channel.health.timer.record("store", took, error)
        counts = {
            "known_blocks": len(lease) - new,
            "stored_blocks": stored,
            "declined_blocks": new - stored,
        }
        self._channel.count(**counts)
        if error:
            self._channel.health.failed("store", error, why, span)
        else:
            self._channel.health.succeeded(span)
        telemetry.end_span(
            span,
            {
                **self._channel.whose,
                telemetry.REQUESTED: len(lease),
                telemetry.STORED: stored,
                telemetry.KNOWN: len(lease) - new,
                telemetry.PAYLOAD: stored * self._front.block_nbytes,
                **({telemetry.FAILED: new - stored} if new > stored else {}),
            },
            error=error or None,
        )

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be written; whether that came about in time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self.waiting_blocks, timeout_s)

    def _written(self, blocks: int) -> None:
        with self._idle:
            self.waiting_blocks -= blocks
            if not self.waiting_blocks:
                self._idle.notify_all()


def _stretches(keys: Sequence[bytes], parents: Parents) -> Iterator[list[bytes]]:
    """``keys`` in runs, each of whose blocks continues the one before it."""
    run: list[bytes] = []
    for key in keys:
        if run and parents[key] != run[-1]:
            yield run
            run = []
        run.append(key)
    if run:
        yield run
