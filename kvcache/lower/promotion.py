"""Promotion: which lower tier holds a block, whether to wait for it, and copying it to L1.

1. Single flight: of several requests that want a block, one reads it and the others wait for that
   read. ``reads_in_flight`` has the reads.
2. A slot is pinned before its block is read. A promoted prefix ends before the first block that
   could not be loaded.
3. Blocks are promoted if, by the durations measured so far, loading is faster than computing. Until
   both are measured, blocks are promoted, which measures loading.
4. A request waits for a promotion at most as long as computing the blocks would take, if that is
   known, and for each call at most until the tier's deadline.
5. A tier that is slower than computing is still read every few seconds, in the background, to
   notice when it becomes faster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import groupby
from math import inf
from typing import Any, Final, TypeVar

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.lower.latency import ComputeModel
from kvcache.lower.pending_call import PendingCall
from kvcache.lower.tier import LowerTier
from kvcache.process import bind_to_process
from kvcache.tier import FrontTier, Lease
from kvcache.worker_pool import WorkerPool

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_TIMEOUT_S: Final = 2.0
"""For closing all lower tiers, after their write queues were flushed."""

_WAITING_THREADS = 8
_PIECES_IN_FLIGHT = 2  # of one promotion: the tier reads one while the next is queued


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


@dataclass(slots=True)
class _Piece:
    """Consecutive blocks that one call promotes; their slots are pinned.

    Attributes:
        pin: the lease on the slots; a block without a slot is not in it.
        read: this promotion's read of the blocks that no other promotion reads.
        other_reads: other promotions' reads of the remaining blocks (single flight).
        all_pinned: whether L1 had a slot for every block.
        reads_all: whether ``read`` covers every block.
    """

    pin: Lease
    read: PendingCall[int] | None
    other_reads: list[Future[None]]
    all_pinned: bool
    reads_all: bool

    def wait_done(self, timeout_s: float) -> bool:
        """Wait for the reads to end, well or not; return whether they have.

        Unlike :meth:`wait_read`, this records nothing in the tier's health.
        """
        reads: list[Future[Any]] = list(self.other_reads)
        if self.read is not None:
            reads.append(self.read.future)
        return not wait(reads, timeout_s).not_done

    def wait_read(self, timeout_s: float) -> bool:
        """Wait for the reads until their deadline; return whether promotion can continue."""
        answered = self.read is None or self.read.wait() is not None
        return answered and not wait(self.other_reads, timeout_s).not_done


class LowerTiers:
    """The lower tiers of a stack, nearest first.

    Args:
        front: L1.
        tiers: the lower tiers.
        clock: the current time in seconds.
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
        self._lock = threading.Lock()
        self.reads_in_flight: dict[bytes, Future[None]] = {}  # by the key of each block being read
        self.compute_model = ComputeModel()
        bind_to_process(self)

    @property
    def accepts_calls(self) -> bool:
        """Whether any lower tier would be called now."""
        return any(tier.channel.accepts_calls for tier in self.tiers)

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
        closing = [
            tier.channel.control_worker.submit(tier.close, flush_until, close_until)
            for tier in self.tiers
        ]
        wait(closing, close_until - time.monotonic())
        for tier, closed in zip(self.tiers, closing, strict=True):
            if not closed.done():
                log.warning("kvcache: tier %s: close hangs; it is left open", tier.name)
            elif not closed.cancelled() and (error := closed.exception()):
                log.warning("kvcache: tier %s: close failed (%s)", tier.name, error)
        self._waiters.drop_queued()
        self._waiters.close(max(0.0, close_until - time.monotonic()))
        for tier in self.tiers:
            tier.channel.control_worker.close(max(0.0, close_until - time.monotonic()))

    # Lookup

    def find(self, match: Match, span: Span) -> Match:
        """Extend L1's ``match`` by the blocks of lower tiers that are worth promoting."""
        depth = match.start + match.blocks
        rest = match.keys[depth:]
        sources: list[int | None] = [0 if held else None for held in self._front.contains(rest)]
        for number, tier in enumerate(self.tiers, 1):
            missing = [at for at, source in enumerate(sources) if source is None]
            if not missing:
                break
            keys = [rest[at] for at in missing]
            compute_s = self.compute_model.pessimistic(len(keys), depth)
            if compute_s is not None and tier.lookup_seconds(len(keys)) > compute_s:
                self._skip(tier, telemetry.TIER_CONTAINS, keys, span)
                continue
            for at, held in zip(missing, tier.contains(keys, span), strict=True):
                if held:
                    sources[at] = number
        found = [source for source in sources[: _first_none(sources)] if source is not None]
        worth = self._blocks_worth_promoting(found, depth)
        for source, at, end in _runs_by_source(found, worth):
            if source:
                self._skip(self.tiers[source - 1], telemetry.TIER_LOAD, rest[at:end], span)
        blocks = match.blocks + worth
        return Match(match.keys, match.start, blocks, (*(0,) * match.blocks, *found[:worth]))

    def _blocks_worth_promoting(self, sources: Sequence[int], depth: int) -> int:
        """Return how many leading blocks to promote so that loading and computing take least time.

        Args:
            sources: the tier of each block.
            depth: the number of blocks of the prompt before them.
        """
        blocks, saved_s, most_saved_s = 0, 0.0, 0.0
        for source, at, end in _runs_by_source(sources):
            saved_s += self.compute_model.pessimistic(end - at, depth + at) or 0.0
            saved_s -= self.tiers[source - 1].load_seconds(end - at) if source else 0.0
            if saved_s >= most_saved_s or not self.compute_model.known:
                blocks, most_saved_s = end, saved_s
        return blocks

    def _skip(self, tier: LowerTier, span_name: str, keys: Sequence[bytes], span: Span) -> None:
        """Have the engine compute ``keys``; remeasure the tier if that is due."""
        tier.record_skip(span_name, len(keys), span)
        if tier.claim_remeasure():
            self.submit(self._remeasure, tier, keys[: tier.channel.blocks_per_call])

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
        keys = match.held
        pins = [self._front.pin(keys)]  # before other blocks are evicted to make room
        until = self._clock() + (self._patience_s(match) if patience_s is None else patience_s)
        try:
            for source, at, end in _runs_by_source(match.sources, len(pins[0])):
                if not self._promote_from(source, keys[:end], at, until, pins, span):
                    break
            return self._front.pin(keys)
        finally:
            for pin in pins:
                pin.end()

    def _patience_s(self, match: Match) -> float:
        """Return how long computing the blocks of lower tiers would take; infinity if unknown."""
        tiers = {self.tiers[source - 1] for source in match.sources if source}
        blocks = sum(map(bool, match.sources))
        compute_s = self.compute_model.pessimistic(blocks, match.start + match.blocks - blocks)
        if compute_s is None or any(tier.loads_even_if_slower for tier in tiers):
            return inf
        return compute_s

    def _promote_from(
        self,
        source: int,
        keys: Sequence[bytes],
        start: int,
        until: float,
        pins: list[Lease],
        parent_span: Span,
    ) -> bool:
        """Promote ``keys[start:]`` from one tier, in pieces of one call each.

        Args:
            source: the tier's number; 0 if L1 held the blocks when they were looked up.
            keys: the prefix that ends with this tier's blocks.
            start: the position of this tier's first block.
            until: when to stop waiting, by the clock.
            pins: gets the lease of each piece.
            parent_span: the parent of the tier's span.

        Returns:
            whether to go on with the next tier's blocks.
        """
        tier = self.tiers[source - 1] if source else None
        span = telemetry.start_child(parent_span, telemetry.TIER_LOAD) if tier else INVALID_SPAN
        size = tier.channel.blocks_per_call if tier else len(keys)
        deadline_s = max(each.channel.deadline_s for each in self.tiers)
        begun, complete = self._clock(), True
        pieces: list[_Piece] = []
        in_flight: deque[_Piece] = deque()
        for at in range(start, len(keys), size):
            if len(in_flight) == _PIECES_IN_FLIGHT:
                if not self._wait_until(in_flight[0], until, deadline_s):
                    break
                complete = in_flight.popleft().wait_read(deadline_s) and self._clock() < until
                if not complete:
                    break
            parent = keys[at - 1] if at else None
            piece = self._start_piece(tier, keys[at : at + size], parent, span)
            pins.append(piece.pin)
            pieces.append(piece)
            in_flight.append(piece)
            if not piece.all_pinned:
                complete = False
                break
        while in_flight and self._wait_until(in_flight[0], until, deadline_s):
            complete &= in_flight.popleft().wait_read(deadline_s)
        calls = [piece.read for piece in pieces if piece.read is not None]
        if tier:
            tier.end_load_span(calls, len(keys) - start, span, gave_up=bool(in_flight))

        def record_outcome() -> None:
            """Record the remaining reads in the tier's health, and the duration of all reads."""
            for piece in in_flight:
                piece.wait_read(deadline_s)
            if tier and all(piece.reads_all for piece in pieces):
                tier.observe_load(calls, self._clock() - begun)

        if not in_flight:
            record_outcome()
            return complete
        self.submit(record_outcome)  # in a thread that may wait for the deadline
        return False

    def _wait_until(self, piece: _Piece, until: float, deadline_s: float) -> bool:
        """Wait for ``piece``, not beyond ``until``; return whether ``wait_read`` may be called.

        It may be called if the reads have ended, or if their deadline is before ``until``.
        """
        remaining_s = until - self._clock()
        return remaining_s >= deadline_s or piece.wait_done(max(0.0, remaining_s))

    def _start_piece(
        self, tier: LowerTier | None, keys: Sequence[bytes], parent: bytes | None, span: Span
    ) -> _Piece:
        """Pin ``keys``, and start to read those that L1 neither holds nor is filling."""
        with self._lock:  # single flight: one promotion reserves a block, others find its read
            lease = self._front.reserve(keys, parent)
            reserved = set(lease.keys)
            other_reads = {
                self.reads_in_flight[key]
                for key in keys
                if key in self.reads_in_flight and key not in reserved
            }
            pin = self._front.pin_any(keys)
            ended: Future[None] = Future()
            self.reads_in_flight.update(dict.fromkeys(reserved, ended))

        def on_end(lease: Lease, _: frozenset[bytes]) -> None:
            with self._lock:
                for key in lease.keys:
                    # After a clear() another promotion may be reading the same key.
                    if self.reads_in_flight.get(key) is ended:
                        del self.reads_in_flight[key]
            ended.set_result(None)

        lease.add_end_callback(on_end)
        read = None
        if lease.keys and tier:
            read = tier.load(lease, span)
        else:
            # Without a tier, L1 held the keys of this lease when they were looked up, and has
            # evicted them since.
            lease.end(failed=lease.keys)
        return _Piece(
            pin,
            read,
            list(other_reads),
            all_pinned=len(pin) == len(keys),
            reads_all=len(reserved) == len(keys),
        )


def _first_none(values: Sequence[object]) -> int:
    """Return the position of the first ``None``, or the length."""
    return next((at for at, value in enumerate(values) if value is None), len(values))


def _runs_by_source(sources: Sequence[int], start: int = 0) -> Iterator[tuple[int, int, int]]:
    """Split ``sources[start:]`` into runs of one tier: the tier, the run's start and its end."""
    at = start
    for source, run in groupby(sources[start:]):
        end = at + sum(1 for _ in run)
        yield source, at, end
        at = end
