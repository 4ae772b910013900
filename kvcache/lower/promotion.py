"""What is below L1: which tier has a block, whether it is worth waiting for, and bringing it up.

1. What comes up is pinned before it is there, read once however many ask for it, and cut at the
   first hole: a block is never taken for its neighbour.
2. Blocks are brought up where that is expected to take less time than computing them again, as both
   were measured here; while either is unknown, they are brought up, since that measures it.
3. Nobody waits longer for what comes up than computing it would have taken, where that is known,
   and for one answer no longer than its tier's deadline.
4. A tier that is too slow is read now and then with nobody waiting, so that it is known when it no
   longer is.
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
from kvcache.lower.tier import LowerTier
from kvcache.lower.worker_pool import PendingCall, WorkerPool
from kvcache.process import bind_to_process
from kvcache.tier import FrontTier, Lease

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_S: Final = 2.0  # to close all tiers, after what waits was written
_WAITERS = 8
_AHEAD = 2  # pieces of one fetch under way: one is read while the next is asked for


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of ``keys[start:]`` that is held: ``blocks`` of them."""

    keys: Sequence[bytes]
    start: int
    blocks: int
    sources: tuple[int, ...] = ()  # tier of each block held, 0 being L1; empty: all are in L1

    @property
    def held(self) -> Sequence[bytes]:
        """The keys of the blocks that are held."""
        return self.keys[self.start : self.start + self.blocks]


@dataclass(slots=True)
class _Piece:
    """Blocks on their way up: pinned already, one read of ours, and reads of others to wait for."""

    hold: Lease
    answer: PendingCall[int] | None
    others: list[Future[None]]
    whole: bool  # there is a slot for every block
    ours: bool  # every block is read by us

    def over(self, timeout_s: float) -> bool:
        """Wait for the reads, and judge nobody; whether they are over."""
        reads: list[Future[Any]] = list(self.others)
        if self.answer is not None:
            reads.append(self.answer.future)
        return not wait(reads, timeout_s).not_done

    def arrived(self, timeout_s: float) -> bool:
        """Wait for the reads; whether they went well enough to go on."""
        well = self.answer is None or self.answer.wait() is not None
        return well and not wait(self.others, timeout_s).not_done


class LowerTiers:
    """The tiers below ``front``, nearest first, and who is on the way up from them."""

    def __init__(
        self,
        front: FrontTier,
        lower: Sequence[LowerTier],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lower = tuple(lower)
        self._front = front
        self._clock = clock
        # Threads that wait for tiers: none for L1 alone, else all of them now, since a process
        # that exits can start none.
        self._waiters = WorkerPool("stack", _WAITERS if lower else 0)
        self._lock = threading.Lock()
        self._coming: dict[bytes, Future[None]] = {}  # blocks on their way up, and their read
        self.computing = ComputeModel()  # of the engine: what bringing up has to beat
        bind_to_process(self)

    @property
    def awake(self) -> bool:
        """Whether there is anybody to ask."""
        return any(not (lower.channel.asleep or lower.channel.closed) for lower in self.lower)

    def submit(self, call: Callable[..., T], *arguments: object) -> Future[T]:
        """Have ``call`` made in a thread that may wait for tiers; cancelled after ``close``."""
        return self._waiters.submit(call, *arguments)

    def close(self, flush_s: float) -> None:
        """Close all tiers at once: what hangs is left, with the memory that was lent to it.

        What waits is written for ``flush_s`` at most. All the rest of closing, of all tiers
        together, has :data:`CLOSE_S` more.
        """
        flush_until = time.monotonic() + flush_s
        until = flush_until + CLOSE_S
        closing = [each.channel.aside.submit(each.close, flush_until, until) for each in self.lower]
        wait(closing, until - time.monotonic())
        for lower, closed in zip(self.lower, closing, strict=True):
            if not closed.done():
                log.warning("kvcache: tier %s: close hangs; it is left open", lower.name)
            elif not closed.cancelled() and (error := closed.exception()):
                log.warning("kvcache: tier %s: close failed (%s)", lower.name, error)
        self._waiters.drop_waiting()
        self._waiters.close(max(0.0, until - time.monotonic()))
        for lower in self.lower:
            lower.channel.aside.close(max(0.0, until - time.monotonic()))

    # Looking

    def find(self, match: Match, span: Span) -> Match:
        """Go on from what L1 has with what is worth bringing up, up to a block that none has."""
        depth = match.start + match.blocks
        rest = match.keys[depth:]
        sources: list[int | None] = [0 if held else None for held in self._front.contains(rest)]
        for number, lower in enumerate(self.lower, 1):
            asked = [at for at, source in enumerate(sources) if source is None]
            if not asked:
                break
            keys = [rest[at] for at in asked]
            computing = self.computing.pessimistic(len(keys), depth)
            if computing is not None and lower.asking_takes(len(keys)) > computing:
                self._skip(lower, telemetry.TIER_CONTAINS, keys, span)
                continue
            for at, held in zip(asked, lower.contains(keys, span), strict=True):
                if held:
                    sources[at] = number
        found = [source for source in sources[: _hole(sources)] if source is not None]
        worth = self._worth(found, depth)
        for source, at, end in _stretches(found, worth):
            if source:
                self._skip(self.lower[source - 1], telemetry.TIER_LOAD, rest[at:end], span)
        blocks = match.blocks + worth
        return Match(match.keys, match.start, blocks, (*(0,) * match.blocks, *found[:worth]))

    def _worth(self, sources: Sequence[int], depth: int) -> int:
        """How many leading blocks to bring up, for the least time of loads and computing.

        ``depth`` is how many blocks of the prompt are before them.
        """
        blocks, saved, most_saved = 0, 0.0, 0.0
        for source, at, end in _stretches(sources):
            saved += self.computing.pessimistic(end - at, depth + at) or 0.0
            saved -= self.lower[source - 1].loading_takes(end - at) if source else 0.0
            if saved >= most_saved or not self.computing.known:
                blocks, most_saved = end, saved
        return blocks

    def _skip(self, lower: LowerTier, name: str, keys: Sequence[bytes], span: Span) -> None:
        lower.skipped(name, len(keys), span)
        if lower.look_again():
            self.submit(self._try, lower, keys[: lower.channel.blocks_per_call])

    def _try(self, lower: LowerTier, keys: Sequence[bytes]) -> None:
        """Read what ``lower`` has of ``keys``, to see how long it takes."""
        blocks = _hole([held or None for held in lower.contains(keys, INVALID_SPAN)])
        source = self.lower.index(lower) + 1
        match = Match(keys, 0, blocks, (source,) * blocks)
        self.promote(match, INVALID_SPAN, patience_s=inf).end()

    # Bringing up

    def promote(self, match: Match, span: Span, patience_s: float | None = None) -> Lease:
        """Pin what L1 has of ``match``, fill what it lacks, and pin the prefix that came of it.

        Args:
            match: what :meth:`find` found.
            span: under which the tiers' spans go.
            patience_s: how long to wait; ``None`` is as long as computing would take.
        """
        keys = match.held
        holds = [self._front.pin(keys)]  # before room is made for the rest
        until = self._clock() + (self._patience(match) if patience_s is None else patience_s)
        try:
            for source, at, end in _stretches(match.sources, len(holds[0])):
                if not self._promote_from(source, keys[:end], at, until, holds, span):
                    break
            return self._front.pin(keys)
        finally:
            for hold in holds:
                hold.end()

    def _patience(self, match: Match) -> float:
        whose = {self.lower[source - 1] for source in match.sources if source}
        blocks = sum(map(bool, match.sources))
        computing = self.computing.pessimistic(blocks, match.start + match.blocks - blocks)
        if computing is None or any(lower.waits_if_slower for lower in whose):
            return inf
        return computing

    def _promote_from(
        self,
        source: int,
        keys: Sequence[bytes],
        start: int,
        until: float,
        holds: list[Lease],
        span: Span,
    ) -> bool:
        """Bring ``keys[start:]`` up from one tier; whether to go on with the next.

        A piece is what a tier takes in one call. Their holds are added to ``holds``.
        """
        lower = self.lower[source - 1] if source else None
        climb = telemetry.start_child(span, telemetry.TIER_LOAD) if lower else INVALID_SPAN
        size = lower.channel.blocks_per_call if lower else len(keys)
        patience_s = max(lower.channel.deadline_s for lower in self.lower)
        begun, well = self._clock(), True
        pieces: list[_Piece] = []
        coming: deque[_Piece] = deque()  # those of them that nobody has waited for
        for at in range(start, len(keys), size):
            if len(coming) == _AHEAD:
                if not self._in_time(coming[0], until, patience_s):
                    break
                well = coming.popleft().arrived(patience_s) and self._clock() < until
                if not well:
                    break
            parent = keys[at - 1] if at else None
            piece = self._ask_for(lower, keys[at : at + size], parent, climb)
            holds.append(piece.hold)
            pieces.append(piece)
            coming.append(piece)
            if not piece.whole:
                well = False
                break
        while coming and self._in_time(coming[0], until, patience_s):
            well &= coming.popleft().arrived(patience_s)
        if lower:
            answers = [piece.answer for piece in pieces if piece.answer is not None]
            lower.climbed(answers, len(keys) - start, climb, late=bool(coming))

        def judge() -> None:  # a breaker has to be told, and how long it took
            for piece in coming:
                piece.arrived(patience_s)
            if lower and all(piece.ours for piece in pieces):
                lower.took(answers, self._clock() - begun)

        if not coming:
            judge()
            return well
        self.submit(judge)
        return False

    def _in_time(self, piece: _Piece, until: float, patience_s: float) -> bool:
        """Wait for ``piece`` while there is time; ``False`` if there is none left for it."""
        left = until - self._clock()
        return left >= patience_s or piece.over(max(0.0, left))

    def _ask_for(
        self, lower: LowerTier | None, keys: Sequence[bytes], parent: bytes | None, span: Span
    ) -> _Piece:
        """Pin ``keys``, those that nobody has or reads in slots of their own, and begin to read."""
        with self._lock:  # of two who want a block one reads it, and the other knows who
            lease = self._front.reserve(keys, parent)
            mine = set(lease.keys)
            others = {self._coming[key] for key in keys if key in self._coming and key not in mine}
            hold = self._front.pin_any(keys)
            read: Future[None] = Future()
            self._coming.update(dict.fromkeys(mine, read))

        def ended(lease: Lease, _: frozenset[bytes]) -> None:
            with self._lock:
                for key in lease.keys:
                    if self._coming.get(key) is read:  # after a clear it may be another's
                        del self._coming[key]
            read.set_result(None)

        lease.add_end_callback(ended)
        answer = None
        if lease.keys and lower:
            answer = lower.load(lease, span)
        else:
            lease.end(failed=lease.keys)  # it has left L1 since it was looked up
        count = len(keys)
        return _Piece(hold, answer, list(others), whole=len(hold) == count, ours=len(mine) == count)


def _hole(sources: Sequence[object]) -> int:
    """Where the first ``None`` is."""
    return next((at for at, source in enumerate(sources) if source is None), len(sources))


def _stretches(sources: Sequence[int], start: int = 0) -> Iterator[tuple[int, int, int]]:
    """``sources[start:]`` in runs of one tier each: the tier, and where its run begins and ends."""
    at = start
    for source, run in groupby(sources[start:]):
        end = at + sum(1 for _ in run)
        yield source, at, end
        at = end
