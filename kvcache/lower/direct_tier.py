"""One of the direct tiers: its loads into the caller's memory, and its stores from there.

1. The caller's memory is lent to a call of the tier, and taken back at the call's deadline
   (``lent_calls``).
2. Every offered block is counted once, as stored, known, declined or dropped, also by a late call.
3. All calls of an operation use the namespace at its start: after a reset, the later calls of a
   store drop their blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Literal, TypeVar

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.lower.caller import PIECE_NBYTES, TierCaller
from kvcache.lower.circuit_breaker import CircuitBreaker
from kvcache.lower.lent_calls import CallSeries, run_series
from kvcache.lower.offer import offer
from kvcache.lower.pending_call import PendingCall
from kvcache.tier import Tier
from kvcache.worker_pool import STORE

T = TypeVar("T")

_LEAST_IN_FLIGHT = 4  # calls of one operation: each time that its thread wakes costs CPU time


class StoreAnswer(IntEnum):
    """A tier's answer to the offer of a block; true if it holds the block now."""

    DECLINED = 0
    KNOWN = 1  # held before
    STORED = 2


class DirectTier(TierCaller):
    """One of several direct tiers.

    Args:
        tier: the tier. It must touch buffers by slice assignment alone, as ``Framed`` does.
        name: its name in the profile.
        namespace: the namespace of the blocks.
        block_nbytes: bytes of the largest block.
        about: a JSON object that describes the namespace to people.
        deadline_s: how long a caller waits for one answer.
        calls: how many calls run in parallel.
        if_slower: whether a lookup reports blocks for which loading is predicted to take longer
            than computing.
        kind: the tier's kind in the profile; "" is the name of its class.
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
        namespace: bytes,
        block_nbytes: int,
        about: str = "",
        deadline_s: float = 1.0,
        calls: int = 2,
        if_slower: Literal["compute", "load"] = "compute",
        kind: str = "",
        clock: Callable[[], float] = time.monotonic,
        piece_nbytes: int = PIECE_NBYTES,
        breaker: CircuitBreaker | None = None,
        lookup: Literal["ask", "load"] = "ask",
    ) -> None:
        super().__init__(
            tier,
            name=name,
            kind=kind,
            namespace=namespace,
            about=about,
            block_nbytes=block_nbytes,
            deadline_s=deadline_s,
            calls=calls,
            if_slower=if_slower,
            clock=clock,
            piece_nbytes=piece_nbytes,
            breaker=breaker,
            lookup=lookup,
        )
        self._most_in_flight = max(_LEAST_IN_FLIGHT, 2 * calls)
        self._measurement: PendingCall[bool] | None = None

    # Loads

    def load(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[memoryview],
        positions: Sequence[int],
        parent_span: Span,
    ) -> list[int]:
        """Fill some of the buffers; return the positions of those that were filled.

        Args:
            keys: of all blocks of the operation.
            buffers: of all blocks of the operation.
            positions: of the blocks to load.
            parent_span: the parent of the span of these calls.
        """
        span = telemetry.start_child(parent_span, telemetry.TIER_LOAD)
        begun = self.channel.clock()
        # A reset during the operation must not change the names of its later blocks.
        start = partial(self._start_load, self.namespace, keys, span)
        assumed = self.channel.assumes_held
        series = self._series(buffers, positions, start, writable=True, assumed=assumed)
        run_series([series])
        self.observe_load(series.calls, self.channel.clock() - begun)
        filled = [at for at in positions if series.answers.get(at)]
        counts = {
            telemetry.REQUESTED: len(positions),
            telemetry.HIT: len(filled),
            telemetry.PAYLOAD: sum(len(buffers[at]) for at in filled),
        }
        self._end_span(span, series.calls, counts)
        return filled

    def _start_load(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        span: Span,
        positions: Sequence[int],
        views: Sequence[memoryview],
    ) -> PendingCall[bool]:
        asked = [keys[at] for at in positions]
        fill = partial(self._fill, namespace, asked, views, [len(view) for view in views])
        return self._start_call(
            "load", fill, len(asked), span, on_cancel=lambda: None, queue_counts=False
        )

    def _fill(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        views: Sequence[memoryview],
        sizes: Sequence[int],
    ) -> list[bool]:
        """Load each block, in a worker's thread; return whether it has exactly its size."""
        filled: list[bool] = []
        try:
            written = self.channel.load(namespace, keys, views)
            filled = [nbytes == size for nbytes, size in zip(written, sizes, strict=True)]
            return filled
        finally:
            loaded = sum(filled)
            nbytes = sum(size for size, done in zip(sizes, filled, strict=False) if done)
            self._count_loaded(loaded, len(keys) - loaded, nbytes)

    # Stores

    def start_store(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        blocks: Sequence[memoryview],
        span: Span,
    ) -> CallSeries[StoreAnswer]:
        """Return the calls that offer the blocks to the tier; :meth:`end_store` ends them."""
        start = partial(self._start_store, self.namespace, keys, parents, span)
        return self._series(blocks, range(len(keys)), start, writable=False)

    def end_store(
        self, series: CallSeries[StoreAnswer], blocks: Sequence[memoryview], span: Span
    ) -> list[int]:
        """End the span of the calls, and count what was not offered; return what is held now."""
        self.channel.add_counts(dropped_blocks=len(series.unasked))
        answers = series.answers
        stored = [at for at, answer in answers.items() if answer == StoreAnswer.STORED]
        held = [at for at, answer in answers.items() if answer]
        offered = len(blocks) - len(series.unasked)
        counts = {
            telemetry.REQUESTED: len(blocks),
            telemetry.STORED: len(stored),
            telemetry.KNOWN: len(held) - len(stored),
            telemetry.PAYLOAD: sum(len(blocks[at]) for at in stored),
        }
        if failed := offered - len(held):
            counts[telemetry.FAILED] = failed
        self._end_span(span, series.calls, counts)
        return held

    def _start_store(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        span: Span,
        positions: Sequence[int],
        views: Sequence[memoryview],
    ) -> PendingCall[StoreAnswer]:
        offered = [keys[at] for at in positions]
        put = partial(
            self._put,
            namespace,
            offered,
            [parents[at] for at in positions],
            views,
            [len(view) for view in views],
        )
        drop = partial(self.channel.add_counts, dropped_blocks=len(offered))
        return self._start_call(
            "store",
            put,
            len(offered),
            span,
            on_cancel=drop,
            priority=STORE,
            queue_counts=False,  # it may wait for other calls of this operation
        )

    def _put(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        views: Sequence[memoryview],
        sizes: Sequence[int],
    ) -> list[StoreAnswer]:
        """Offer the blocks to the tier, in a worker's thread."""
        answers = [StoreAnswer.DECLINED] * len(keys)
        if namespace != self.channel.namespace:  # reset: no later lookup finds these blocks
            self.channel.add_counts(dropped_blocks=len(keys))
            return answers
        try:
            offered = offer(self.channel, namespace, keys, parents, views)
            for at, (known, held) in enumerate(zip(*offered, strict=True)):
                if held:
                    answers[at] = StoreAnswer.KNOWN if known else StoreAnswer.STORED
            return answers
        finally:
            new = [answer == StoreAnswer.STORED for answer in answers]
            self.channel.add_counts(
                known_blocks=answers.count(StoreAnswer.KNOWN),
                stored_blocks=sum(new),
                stored_nbytes=sum(size for size, is_new in zip(sizes, new, strict=True) if is_new),
                declined_blocks=answers.count(StoreAnswer.DECLINED),
            )

    def _series(
        self,
        buffers: Sequence[memoryview],
        positions: Sequence[int],
        start: Callable[[Sequence[int], Sequence[memoryview]], PendingCall[T]],
        *,
        writable: bool,
        assumed: bool = False,
    ) -> CallSeries[T]:
        return CallSeries(
            buffers,
            positions,
            self.channel.blocks_per_call,
            self._most_in_flight,
            start,
            writable=writable,
            assumed=assumed,
        )

    # Measuring a tier that is not called because it is slow

    def remeasure(self, keys: Sequence[bytes]) -> None:
        """Look up and load some of ``keys`` in the background, if that is due.

        The blocks are loaded into memory of this tier, which is released afterwards.
        """
        if not self.claim_remeasure():
            return
        if self._measurement is not None and not self._measurement.future.done():
            return  # the tier hangs: further calls would only queue up
        keys, namespace = keys[: self.channel.blocks_per_call], self.namespace
        if self.channel.assumes_held:
            self._start_measuring_load(namespace, keys, self.channel.may_hold(namespace, keys))
        else:
            measure = partial(self._measure_lookup, namespace, keys)
            self._measurement = self._start_background("contains", measure, len(keys))

    def _start_measuring_load(
        self, namespace: bytes, keys: Sequence[bytes], held: Sequence[bool]
    ) -> None:
        found = [key for key, is_held in zip(keys, held, strict=True) if is_held]
        if found:
            measure = partial(self._measure_load, namespace, found)
            self._measurement = self._start_background("load", measure, len(found))

    def _start_background(
        self, operation: str, call: Callable[[], list[bool]], answer_count: int
    ) -> PendingCall[bool]:
        return self._start_call(operation, call, answer_count, INVALID_SPAN, on_cancel=lambda: None)

    def _measure_lookup(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        begun = self.channel.clock()
        held = self.channel.contains(namespace, keys)
        self._lookup_latency.observe(len(keys), self.channel.clock() - begun)
        self.channel.add_counts(lookup_blocks=len(keys), hit_blocks=sum(held))
        self._start_measuring_load(namespace, keys, held)
        return held

    def _measure_load(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        size = self.block_nbytes
        views = [memoryview(bytearray(size)) for _ in keys]
        begun = self.channel.clock()
        written = self.channel.load(namespace, keys, views)
        loaded = len(keys) - written.count(0)
        if loaded == len(keys):
            self._load_latency.observe(loaded, self.channel.clock() - begun)
        else:  # a load with misses says nothing: measure one of the blocks that the tier holds
            self._start_measuring_load(namespace, keys, [nbytes > 0 for nbytes in written])
        self._count_loaded(loaded, len(keys) - loaded, sum(written))
        return [nbytes > 0 for nbytes in written]
