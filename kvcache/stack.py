"""A stack of tiers, as an engine sees it: match, fetch, reserve.

1. Only the stack knows the prefix rule, the threads, the spans, and that a failure is a miss.
2. ``match`` answers with a value that ``fetch`` takes; what ``fetch`` gives is pinned in L1, may
   be shorter than the match, never longer. Promise an engine only what has been fetched.
3. What is asked of L1 alone is answered in the caller's thread: the future is done when given.
4. A span of ``kvcache.load`` or ``kvcache.store`` lasts as long as its lease, so that it covers the
   copies made under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.tier import FrontTier, Lease, TierStats

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of ``keys[start:]`` that is held: ``blocks`` of them."""

    keys: Sequence[bytes]
    start: int
    blocks: int

    @property
    def held(self) -> Sequence[bytes]:
        """The keys of the blocks that are held."""
        return self.keys[self.start : self.start + self.blocks]


@dataclass(frozen=True, slots=True)
class StackStats:
    """Counts of every tier, the front tier first."""

    profile: str
    tiers: tuple[TierStats, ...]

    @property
    def pinned_slots(self) -> int:
        """Slots of L1 under leases that have not ended; 0 when nothing is in flight."""
        return self.tiers[0].pinned_slots


class Stack:
    """Tiers in order, the front tier first. Safe to call from several threads.

    Args:
        front: the tier that lends its memory.
        profile: the name that spans and stats carry.
    """

    def __init__(self, front: FrontTier, *, profile: str) -> None:
        self.front = front
        self.profile = profile

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
        span = telemetry.start(telemetry.LOOKUP, context)
        blocks = self.front.access(keys, start)
        telemetry.end(
            span,
            {
                telemetry.PROFILE: self.profile,
                telemetry.REQUESTED: len(keys) - start,
                telemetry.HIT: blocks,
            },
        )
        return _done(Match(keys, start, blocks))

    def fetch(self, match: Match, *, context: Context | None = None) -> Future[Lease]:
        """Bring the blocks of ``match`` into L1 and pin them until the lease ends."""
        span = telemetry.start(telemetry.LOAD, context)
        lease = self.front.pin(match.held)

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            self._end(span, telemetry.HIT, match.blocks, lease, failed)

        lease.on_end(ended)
        return _done(lease)

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
        lease = self.front.reserve(keys, after)
        if not lease.keys:
            return lease
        span = telemetry.start(telemetry.STORE, context)

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            self._end(span, telemetry.STORED, len(keys), lease, failed)

        lease.on_end(ended)
        return lease

    def _end(
        self,
        span: Span,
        outcome: str,
        requested: int,
        lease: Lease,
        failed: frozenset[bytes],
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

    def clear(self) -> None:
        """Forget every block of every tier. Leases that are out end as usual, and publish none."""
        self.front.clear()

    def stats(self) -> StackStats:
        """Counts at this moment."""
        return StackStats(self.profile, (self.front.stats(),))

    def close(self) -> None:
        """Close every tier. Closing twice is allowed."""
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


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
