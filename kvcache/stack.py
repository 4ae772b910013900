"""A stack of tiers, as an engine sees it: match, fetch, reserve.

1. Only the stack knows the prefix rule, the write policy, the spans, and who holds what.
2. ``match`` answers with a value that ``fetch`` takes; what ``fetch`` gives is pinned in L1, and
   may be shorter than the match, never longer. Promise an engine only what has been fetched.
3. What L1 alone can answer is answered in the caller's thread: the future is done when given.
4. What comes up from a lower tier is pinned before it is there, read once however many ask for it,
   and cut at the first hole: a block is never taken for its neighbour.
5. What an engine stored goes down to every lower tier when its lease has ended, or where a tier
   asks for that when it is used again; what came up does not go down again.
6. A span of ``kvcache.load`` or ``kvcache.store`` lasts as long as its lease, so that it covers the
   copies made under it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.lower import Answer, Lower, LowerStats
from kvcache.tier import FrontTier, Lease, TierStats

T = TypeVar("T")

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


@dataclass(frozen=True, slots=True)
class StackStats:
    """Counts of L1, and of every tier below it."""

    profile: str
    tiers: tuple[TierStats, ...]
    lower: tuple[LowerStats, ...] = ()

    @property
    def pinned_slots(self) -> int:
        """Slots of L1 under leases that have not ended; 0 when nothing is in flight."""
        return self.tiers[0].pinned_slots


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks on their way up: pinned already, one read of ours, and reads of others to wait for."""

    hold: Lease
    answer: Answer[int] | None
    others: list[Future[None]]
    whole: bool  # there is a slot for every block

    def arrived(self, timeout_s: float) -> bool:
        """Wait for the reads; whether they went well enough to go on."""
        well = self.answer is None or self.answer.wait() is not None
        return well and not wait(self.others, timeout_s).not_done


class Stack:
    """Tiers in order, the front tier first. Safe to call from several threads.

    Args:
        front: the tier that lends its memory.
        lower: the tiers below it, nearest first.
        profile: the name that spans and stats carry.
    """

    def __init__(self, front: FrontTier, lower: Sequence[Lower] = (), *, profile: str) -> None:
        self.front = front
        self.profile = profile
        self._lower = tuple(lower)
        # Threads that wait for lower tiers; none is started before one is needed.
        self._waiters = ThreadPoolExecutor(8, "kvcache-stack")
        self._lock = threading.Lock()
        self._coming: dict[bytes, Future[None]] = {}  # blocks on their way up, and their read

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, of all ranks together."""
        return self.front.block_nbytes

    def match(
        self, keys: Sequence[bytes], start: int = 0, *, context: Context | None = None
    ) -> Future[Match]:
        """Find the longest prefix of ``keys[start:]`` that is held anywhere.

        Args:
            keys: a request's chain, from its first block.
            start: blocks that the engine has itself.
            context: the caller's trace; ``None`` is the current one.
        """
        span, match = self._look_here(keys, start, context)
        if start + match.blocks == len(keys) or not self._anyone_below():
            self._looked(span, match)
            return _done(match)

        def look() -> Match:
            found = self._look_below(match)
            self._looked(span, found)
            return found

        return self._waiters.submit(look)

    def fetch(self, match: Match, *, context: Context | None = None) -> Future[Lease]:
        """Bring the blocks of ``match`` into L1 and pin them until the lease ends."""
        if not match.blocks:
            return _done(self.front.pin(()))
        span = telemetry.start(telemetry.LOAD, context)

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            self._ended(span, telemetry.HIT, match.blocks, lease, failed)
            for lower in self._lower:
                lower.used(lease.keys, failed)

        def bring() -> Lease:
            lease = self._bring_up(match) if any(match.sources) else self.front.pin(match.held)
            lease.on_end(ended)
            return lease

        return self._waiters.submit(bring) if any(match.sources) else _done(bring())

    def fetch_here(
        self, keys: Sequence[bytes], start: int = 0, *, context: Context | None = None
    ) -> Lease:
        """Match and fetch at once what L1 has by itself of ``keys[start:]``; waits for nobody."""
        span, match = self._look_here(keys, start, context)
        self._looked(span, match)
        return self.fetch(match, context=context).result()

    def _look_here(
        self, keys: Sequence[bytes], start: int, context: Context | None
    ) -> tuple[Span, Match]:
        """Look in L1; the span of the look-up goes on."""
        span = telemetry.start(telemetry.LOOKUP, context)
        return span, Match(keys, start, self.front.access(keys, start))

    def prefetch(self, keys: Sequence[bytes]) -> Future[None] | None:
        """Bring the longest prefix of ``keys`` into L1, and promise nothing.

        Returns:
            a future, done when what can be had is in L1; ``None`` when there is nothing to do.
        """
        held = self.front.contains(keys) if self._anyone_below() else []
        if all(held):
            return None
        match = Match(keys, 0, held.index(False))

        def bring() -> None:
            found = self._look_below(match)
            if any(found.sources):
                self._bring_up(found).end()

        return self._waiters.submit(bring)

    def reserve(
        self,
        keys: Sequence[bytes],
        after: bytes | None = None,
        *,
        context: Context | None = None,
    ) -> Lease:
        """Lend slots for those of ``keys`` that L1 lacks; ending the lease well publishes them.

        Args:
            keys: a stretch of one chain, in order.
            after: the key of the block that ``keys[0]`` continues; ``None`` for a chain's first.
            context: the caller's trace; ``None`` is the current one.
        """
        spaces = [lower.space for lower in self._lower]  # before a clear may come between
        lease = self.front.reserve(keys, after)
        if not lease.keys:
            return lease
        span = telemetry.start(telemetry.STORE, context)

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            self._ended(span, telemetry.STORED, len(keys), lease, failed)
            if spaces:
                stored = [key for key in lease.keys if key not in failed]
                for lower, space in zip(self._lower, spaces, strict=True):
                    lower.stored(stored, space)

        lease.on_end(ended)
        return lease

    def clear(self) -> None:
        """Forget every block of every tier. Leases that are out end as usual, and publish none."""
        for lower in self._lower:  # first: what is asked for from here on is a miss
            lower.clear()
        self.front.clear()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every lower tier was offered what was stored; whether that came about."""
        return all(lower.flush(timeout_s) for lower in self._lower)

    def stats(self) -> StackStats:
        """Counts at this moment."""
        lower = tuple(lower.stats() for lower in self._lower)
        return StackStats(self.profile, (self.front.stats(),), lower)

    def close(self, flush_s: float = 5.0) -> None:
        """Close every tier, writing for ``flush_s`` at most what waits. Twice is allowed."""
        for lower in self._lower:
            lower.close(flush_s)
        self._waiters.shutdown(cancel_futures=True)
        self.front.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Below L1, in a thread of the stack

    def _anyone_below(self) -> bool:
        return any(not lower.asleep for lower in self._lower)

    def _look_below(self, match: Match) -> Match:
        """Go on from what L1 has with what any tier has, up to a block that none has."""
        rest = match.keys[match.start + match.blocks :]
        sources: list[int | None] = [0 if held else None for held in self.front.contains(rest)]
        for number, lower in enumerate(self._lower, 1):
            asked = [at for at, source in enumerate(sources) if source is None]
            if not asked:
                break
            for at, held in zip(asked, lower.contains([rest[at] for at in asked]), strict=True):
                if held:
                    sources[at] = number
        found = [0] * match.blocks
        for source in sources:
            if source is None:
                break
            found.append(source)
        return Match(match.keys, match.start, len(found), tuple(found))

    def _bring_up(self, match: Match) -> Lease:
        """Pin what L1 has of ``match``, fill what it lacks, and pin the prefix that came of it."""
        keys = match.held
        holds = [self.front.pin(keys)]  # before room is made for the rest
        coming: deque[_Piece] = deque()
        try:
            for source, at, end in self._pieces(match.sources, len(holds[0])):
                if len(coming) == _AHEAD and not coming.popleft().arrived(self._patience_s):
                    break
                piece = self._ask_for(source, keys[at:end], keys[at - 1] if at else None)
                holds.append(piece.hold)
                coming.append(piece)
                if not piece.whole:
                    break
            for piece in coming:  # all of them: a breaker has to be told
                piece.arrived(self._patience_s)
            return self.front.pin(keys)
        finally:
            for hold in holds:
                hold.end()

    @property
    def _patience_s(self) -> float:
        return max(lower.deadline_s for lower in self._lower)

    def _pieces(self, sources: Sequence[int], at: int) -> Iterator[tuple[int, int, int]]:
        """Cut ``sources[at:]`` where the tier changes, and at what a tier takes in one call."""
        while at < len(sources):
            source, end = sources[at], at + 1
            most = at + self._lower[source - 1].blocks_per_call if source else len(sources)
            while end < min(most, len(sources)) and sources[end] == source:
                end += 1
            yield source, at, end
            at = end

    def _ask_for(self, source: int, keys: Sequence[bytes], after: bytes | None) -> _Piece:
        """Pin ``keys``, those that nobody has or reads in slots of their own, and begin to read."""
        with self._lock:  # of two who want a block one reads it, and the other knows who
            lease = self.front.reserve(keys, after)
            mine = set(lease.keys)
            others = {self._coming[key] for key in keys if key in self._coming and key not in mine}
            hold = self.front.hold(keys)
            read: Future[None] = Future()
            self._coming.update(dict.fromkeys(mine, read))

        def ended(lease: Lease, _: frozenset[bytes]) -> None:
            with self._lock:
                for key in lease.keys:
                    if self._coming.get(key) is read:  # after a clear it may be another's
                        del self._coming[key]
            read.set_result(None)

        lease.on_end(ended)
        answer = None
        if lease.keys and source:
            answer = self._lower[source - 1].load(lease)
        else:
            lease.end(failed=lease.keys)  # it has left L1 since it was looked up
        return _Piece(hold, answer, list(others), whole=len(hold) == len(keys))

    # Spans

    def _looked(self, span: Span, match: Match) -> None:
        telemetry.end(
            span,
            {
                telemetry.PROFILE: self.profile,
                telemetry.REQUESTED: len(match.keys) - match.start,
                telemetry.HIT: match.blocks,
            },
        )

    def _ended(
        self, span: Span, outcome: str, requested: int, lease: Lease, failed: frozenset[bytes]
    ) -> None:
        good = len(lease.keys) - len(failed)
        telemetry.end(
            span,
            {
                telemetry.PROFILE: self.profile,
                telemetry.REQUESTED: requested,
                outcome: good,
                telemetry.FAILED: len(failed),
                telemetry.PAYLOAD: good * self.block_nbytes,
            },
            error="copy_failed" if failed else None,
        )


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
