"""Reads of lower tiers into slots of L1, for promotion.

1. Single flight: of several requests that want a block, one reads it and the others wait for that
   read.
2. A slot is pinned before its block is read. The blocks of one tier are read in batches of one call
   each, two at a time.
3. A block is read after the block that it continues has a slot.
4. Where it is only assumed that the tier holds the blocks (``lookup = "load"``), the first batch is
   read alone and has few blocks, and the first batch with a miss is the last one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.keys import Branch, branches_of
from kvcache.lower.pending_call import PendingCall
from kvcache.lower.search import runs_by_source
from kvcache.lower.tier import LowerTier
from kvcache.tier import FrontTier, Lease

_BATCHES_IN_FLIGHT: Final = 2  # of one promotion: the tier reads one while the next is queued
_FIRST_ASSUMED_BLOCKS: Final = 16  # an object store runs so many requests at a time


@dataclass(frozen=True, slots=True)
class WantedBlocks:
    """Blocks that L1 is to hold, each after the block that it continues.

    Attributes:
        keys: of all blocks.
        parents: the key that each block continues.
        sources: the tier that holds each block; 0 for L1.
        chain_keys: how many leading keys are of chains; the others are of side blocks.
    """

    keys: Sequence[bytes]
    parents: Sequence[bytes | None]
    sources: Sequence[int]
    chain_keys: int

    @classmethod
    def of_chain(cls, keys: Sequence[bytes], sources: Sequence[int]) -> WantedBlocks:
        """Return the blocks of one chain, from its first block on."""
        return cls(keys, [None, *keys[:-1]], sources, len(keys))

    def of_source(self, source: int, blocks: int) -> WantedBlocks:
        """Return the first ``blocks`` blocks of one source, in this order."""
        positions = [at for at, each in enumerate(self.sources) if each == source][:blocks]
        return WantedBlocks(
            [self.keys[at] for at in positions],
            [self.parents[at] for at in positions],
            [source] * len(positions),
            sum(at < self.chain_keys for at in positions),
        )

    def branches(self, first: int, end: int) -> tuple[list[Branch], list[Branch]]:
        """Return the blocks ``first`` to ``end`` as segments: of chains, and of side blocks."""
        middle = min(max(first, self.chain_keys), end)
        return (
            branches_of(self.keys[first:middle], self.parents[first:middle]),
            branches_of(self.keys[middle:end], self.parents[middle:end]),
        )


@dataclass(slots=True)
class _Batch:
    """Consecutive blocks that one call promotes; their slots are pinned.

    Attributes:
        pin: the lease on the slots; a block without a slot is not in it.
        read: this promotion's read of the blocks that no other promotion reads.
        other_reads: other promotions' reads of the remaining blocks (single flight).
        all_pinned: whether L1 had a slot for every block.
        reads_all: whether ``read`` covers every block.
    """

    pin: Lease
    read: PendingCall[bool] | None
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


class BlockReads:
    """Reads blocks of lower tiers into L1.

    Args:
        front: L1.
        tiers: the lower tiers, nearest first.
        clock: the current time in seconds.
        submit: runs a call in a thread that may wait for tiers.

    Attributes:
        in_flight: the read of each block that is being read, by its key.
    """

    def __init__(
        self,
        front: FrontTier,
        tiers: Sequence[LowerTier],
        clock: Callable[[], float],
        submit: Callable[[Callable[[], None]], object],
    ) -> None:
        self._front = front
        self._tiers = tiers
        self._clock = clock
        self._submit = submit
        self._lock = threading.Lock()
        self.in_flight: dict[bytes, Future[None]] = {}

    def read(self, wanted: WantedBlocks, until: float, span: Span) -> Lease:
        """Read the wanted blocks that L1 lacks, and pin the leading ones that L1 then holds.

        Args:
            wanted: the blocks.
            until: when to stop waiting, by the clock.
            span: the parent of the tiers' spans.
        """
        # Before other blocks are evicted to make room.
        pins = [self._front.pin(wanted.keys)]
        held = len(pins[0])
        if None in wanted.parents[1:] or wanted.chain_keys < len(wanted.keys):
            pins.append(self._front.pin_any(wanted.keys[held:]))
        try:
            for source, at, end in runs_by_source(wanted.sources, held):
                if not self._read_from(source, wanted, at, end, until, pins, span):
                    break
            return self._front.pin(wanted.keys)
        finally:
            for pin in pins:
                pin.end()

    def _read_from(
        self,
        source: int,
        wanted: WantedBlocks,
        start: int,
        end: int,
        until: float,
        pins: list[Lease],
        parent_span: Span,
    ) -> bool:
        """Read the wanted blocks ``start`` to ``end`` from one tier, in batches of one call each.

        Args:
            source: the tier's number; 0 if L1 held the blocks when they were looked up.
            wanted: all wanted blocks.
            start: the position of this tier's first block.
            end: the position after its last one.
            until: when to stop waiting, by the clock.
            pins: gets the lease of each batch.
            parent_span: the parent of the tier's span.

        Returns:
            whether to continue with the next tier's blocks.
        """
        tier = self._tiers[source - 1] if source else None
        span = telemetry.start_child(parent_span, telemetry.TIER_LOAD) if tier else INVALID_SPAN
        blocks_per_call = tier.channel.blocks_per_call if tier else end - start
        deadline_s = max(each.channel.deadline_s for each in self._tiers)
        begun, complete = self._clock(), True
        assumed = tier is not None and tier.channel.assumes_held
        most_in_flight, size = _first_reads(blocks_per_call, assumed=assumed)
        batches: list[_Batch] = []
        in_flight: deque[_Batch] = deque()
        stop = start
        while stop < end:
            if len(in_flight) == most_in_flight:
                if not self._wait_until(in_flight[0], until, deadline_s):
                    break
                complete = self._wait_complete(in_flight.popleft(), deadline_s, assumed=assumed)
                complete = complete and self._clock() < until
                if not complete:
                    break
                most_in_flight, size = _BATCHES_IN_FLIGHT, blocks_per_call
            at, stop = stop, min(stop + size, end)
            batch = self._start_batch(tier, wanted, at, stop, span)
            pins.append(batch.pin)
            batches.append(batch)
            in_flight.append(batch)
            if not batch.all_pinned:
                complete = False
                break
        while in_flight and self._wait_until(in_flight[0], until, deadline_s):
            complete &= self._wait_complete(in_flight.popleft(), deadline_s, assumed=assumed)
        calls = [batch.read for batch in batches if batch.read is not None]
        if tier:
            tier.end_load_span(calls, end - start, span, gave_up=bool(in_flight))

        def record_outcome() -> None:
            """Record the remaining reads in the tier's health, and the duration of all reads."""
            for batch in in_flight:
                batch.wait_read(deadline_s)
            if tier and all(batch.reads_all for batch in batches):
                tier.observe_load(calls, self._clock() - begun)

        if not in_flight:
            record_outcome()
            return complete
        self._submit(record_outcome)  # in a thread that may wait for the deadline
        return False

    def _wait_until(self, batch: _Batch, until: float, deadline_s: float) -> bool:
        """Wait for ``batch``, not beyond ``until``; return whether ``wait_read`` may be called.

        It may be called if the reads have ended, or if their deadline is before ``until``.
        """
        remaining_s = until - self._clock()
        return remaining_s >= deadline_s or batch.wait_done(max(0.0, remaining_s))

    def _wait_complete(self, batch: _Batch, deadline_s: float, *, assumed: bool) -> bool:
        """Wait for ``batch``, as ``wait_read`` does; return whether promotion can continue.

        Where blocks are ``assumed`` to be held, it continues only if L1 now holds all of the batch.
        """
        answered = batch.wait_read(deadline_s)
        return answered and (not assumed or all(self._front.contains(batch.pin.keys)))

    def _start_batch(
        self, tier: LowerTier | None, wanted: WantedBlocks, first: int, end: int, span: Span
    ) -> _Batch:
        """Pin the blocks, and start to read those that L1 neither holds nor is filling."""
        keys = wanted.keys[first:end]
        with self._lock:  # single flight: one promotion reserves a block, others find its read
            lease = self._front.reserve_branches(*wanted.branches(first, end))
            reserved = set(lease.keys)
            other_reads = {
                self.in_flight[key] for key in keys if key in self.in_flight and key not in reserved
            }
            pin = self._front.pin_any(keys)
            ended: Future[None] = Future()
            self.in_flight.update(dict.fromkeys(reserved, ended))

        def on_end(lease: Lease, _: frozenset[bytes]) -> None:
            with self._lock:
                for key in lease.keys:
                    # After a clear() another promotion may be reading the same key.
                    if self.in_flight.get(key) is ended:
                        del self.in_flight[key]
            ended.set_result(None)

        lease.add_end_callback(on_end)
        read = None
        if lease.keys and tier:
            read = tier.load(lease, span)
        else:
            # Without a tier, L1 held the keys of this lease when they were looked up, and has
            # evicted them since.
            lease.end(failed=lease.keys)
        return _Batch(
            pin,
            read,
            list(other_reads),
            all_pinned=len(pin) == len(keys),
            reads_all=len(reserved) == len(keys),
        )


def _first_reads(blocks_per_call: int, *, assumed: bool) -> tuple[int, int]:
    """Return how many batches may be in flight until the first has ended, and their blocks."""
    if assumed:
        return 1, min(blocks_per_call, _FIRST_ASSUMED_BLOCKS)
    return _BATCHES_IN_FLIGHT, blocks_per_call
