"""A stack of tiers, as an engine sees it: match, fetch, reserve.

1. Only the stack knows the prefix rule, the write policy, the spans, and who holds what.
2. ``match`` answers with a value that ``fetch`` takes; what ``fetch`` gives is pinned in L1, and
   may be shorter than the match, never longer. Promise an engine only what has been fetched.
3. What L1 alone can answer is answered in the caller's thread: the future is done when given.
4. Blocks of lower tiers are promoted to L1 by ``kvcache.lower.promotion``, where that is worth the
   wait.
5. What an engine stored goes down to every lower tier when its lease has ended, or where a tier
   asks for that when it is used again; what came up does not go down again.
6. A span of ``kvcache.load`` or ``kvcache.store`` lasts as long as its lease, so that it covers the
   copies made under it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal, TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import Span

from kvcache import metrics, telemetry
from kvcache.closeable import Closeable
from kvcache.events import BlockEventLog
from kvcache.guards.front_tier import guard_front_tier
from kvcache.lower.promotion import LowerTiers, Match
from kvcache.lower.tier import LowerTier
from kvcache.process import bind_to_process
from kvcache.replay.recorder import SILENT, Recorder, careful
from kvcache.stats import StackStats, TierName
from kvcache.tier import FrontTier, Lease

T = TypeVar("T")


class Stack(Closeable):
    """Tiers in order, the front tier first. Safe to call from several threads.

    Args:
        front: the tier that lends its memory.
        lower: the tiers below it, nearest first.
        profile: the name that spans and stats carry.
        block_tokens: tokens of a block, for spans; 0 if that is not known.
        name: of the front tier, in the profile.
        kind: what the profile calls the front tier's class.
        clock: seconds.
        recorder: is told of every ``match``; who asks by ``fetch_local`` tells it itself.
    """

    def __init__(
        self,
        front: FrontTier,
        lower: Sequence[LowerTier] = (),
        *,
        profile: str,
        block_tokens: int = 0,
        name: str = "l1",
        kind: str = "",
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder = SILENT,
    ) -> None:
        self.front = guard_front_tier(front)
        if lower:
            self.front.disable_admission()
        self.recorder = careful(recorder)
        self.profile = profile
        self._block_tokens = block_tokens
        self._named = TierName(name, kind or type(front).__name__)
        self._timer = metrics.Timer(self._named)
        self._clock = clock
        self._lock = threading.Lock()
        self._loaded_blocks = 0
        self.lower = LowerTiers(self.front, lower, clock)
        metrics.register_stack(self)
        bind_to_process(self)

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
        self.recorder.record(keys)
        span, match = self._find_local(keys, start, context)
        if start + match.blocks == len(keys) or not self.lower.accepts_calls:
            self._looked(span, match)
            return _done(match)

        def find() -> Match:
            found = self.lower.find(match, span)
            self._looked(span, found)
            return found

        return self.lower.submit(find)

    def fetch(self, match: Match, *, context: Context | None = None) -> Future[Lease]:
        """Bring the blocks of ``match`` into L1 and pin them until the lease ends."""
        if not match.blocks:
            return _done(self.front.pin(()))
        span = telemetry.start_span(telemetry.LOAD, context)

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            for lower in self.lower.tiers:
                lower.write_behind.enqueue_reused(lease.keys, failed, span)
            with self._lock:
                self._loaded_blocks += len(lease) - len(failed)
            self._ended(span, telemetry.HIT, match.blocks, lease, failed)

        def lent(lease: Lease) -> Lease:
            lease.span = span
            lease.add_end_callback(ended)
            return lease

        if not any(match.sources):
            return _done(lent(self.front.pin(match.held)))

        def bring() -> Lease:
            return lent(self.lower.promote(match, span))

        return self.lower.submit(bring)

    def fetch_local(
        self, keys: Sequence[bytes], start: int = 0, *, context: Context | None = None
    ) -> Lease:
        """Match and fetch at once what L1 has by itself of ``keys[start:]``; waits for nobody."""
        span, match = self._find_local(keys, start, context)
        self._looked(span, match)
        return self.fetch(match, context=context).result()

    def _find_local(
        self, keys: Sequence[bytes], start: int, context: Context | None
    ) -> tuple[Span, Match]:
        """Look in L1; the span of the look-up goes on."""
        span, begun = telemetry.start_span(telemetry.LOOKUP, context), self._clock()
        held = self.front.access(keys, start)
        self._timer.record("lookup", self._clock() - begun)
        return span, Match(keys, start, held)

    def prefetch(
        self, keys: Sequence[bytes], *, context: Context | None = None
    ) -> Future[Match] | None:
        """Bring the longest prefix of ``keys`` into L1, and promise nothing.

        Returns:
            a future, done when what can be had is in L1, with the tier that each block came from;
            ``None`` when there is nothing to do.
        """
        return self._prefetch(keys, lambda: telemetry.start_span(telemetry.PREFETCH, context))

    def _prefetch(self, keys: Sequence[bytes], begin: Callable[[], Span]) -> Future[Match] | None:
        held = self.front.contains(keys) if self.lower.accepts_calls else []
        if all(held):
            return None
        match = Match(keys, 0, held.index(False))
        span = begin()

        def bring() -> Match:
            found = self.lower.find(match, span)
            if any(found.sources):
                lease = self.lower.promote(found, span)
                lease.end()
                found = replace(found, blocks=len(lease))
            self._looked(span, found)
            return found

        return self.lower.submit(bring)

    def observe_compute(self, blocks: float, seconds: float, depth: float | None = None) -> None:
        """Tell that an engine has computed the KV of ``blocks`` in one step that took so long.

        What would take longer to bring up from lower tiers than to compute is not brought up.

        Args:
            blocks: that the step computed, of all prompts together.
            seconds: that the step took.
            depth: blocks of its prompt before a computed block, the mean over them, since attention
                takes longer the more there are; ``None`` where one prompt was computed from its
                first block.
        """
        if blocks > 0:
            self.lower.compute_model.observe(blocks, seconds, depth)

    def observe_copy(
        self, operation: Literal["load", "store"], seconds: float, *, failed: bool = False
    ) -> None:
        """Tell that an engine's copy out of leased slots, or into them, took so long."""
        self._timer.record(operation, seconds, "copy_failed" if failed else "")

    def reserve(
        self,
        keys: Sequence[bytes],
        parent: bytes | None = None,
        *,
        context: Context | None = None,
    ) -> Lease:
        """Lend slots for those of ``keys`` that L1 lacks; ending the lease well publishes them.

        Args:
            keys: a stretch of one chain, in order.
            after: the key of the block that ``keys[0]`` continues; ``None`` for a chain's first.
            context: the caller's trace; ``None`` is the current one.
        """
        spaces = [lower.namespace for lower in self.lower.tiers]  # before a clear may come between
        lease = self.front.reserve(keys, parent)
        if not lease.keys:
            return lease
        span = telemetry.start_span(telemetry.STORE, context)

        def ended(lease: Lease, failed: frozenset[bytes]) -> None:
            if spaces:
                before = [keys[at - 1] if at else parent for at in lease.positions]
                pairs = zip(lease.keys, before, strict=True)
                stored = {key: parent for key, parent in pairs if key not in failed}
                for lower, namespace in zip(self.lower.tiers, spaces, strict=True):
                    lower.write_behind.enqueue_stored(stored, namespace, span)
            self._ended(span, telemetry.STORED, len(keys), lease, failed)

        lease.span = span
        lease.add_end_callback(ended)
        return lease

    def hint(
        self,
        keys: Sequence[bytes],
        *,
        done: bool = False,
        keep: float = 0.0,
        soon: bool = False,
        context: Context | None = None,
    ) -> None:
        """Say of a chain what is known of its future. It orders evictions, and promises nothing.

        Args:
            keys: of the chain, in order; for ``done`` the stretch that is meant.
            done: they will not be used again: they go before all others, but for those that others
                use after this, or continue.
            keep: seconds for which others had better go first; of a quarter of L1 at most.
            soon: they will be used soon: what lower tiers have of them comes up, unawaited.
            context: the caller's trace; ``None`` is the current one. Its span is the cause of what
                comes up, which has a trace of its own.

        Raises:
            ValueError: for hints that contradict each other, or a time that cannot be.
        """
        if not 0 <= keep < float("inf"):
            raise ValueError(f"keep is {keep}; it takes seconds")
        if done and (keep or soon):
            raise ValueError("done is true, and so is keep or soon; it is one or the other")
        if done:
            self.front.mark_done(keys)
        if keep:
            self.front.protect(keys, keep)
        if soon:
            self.front.access(keys)
            self._prefetch(keys, lambda: telemetry.start_linked(context, telemetry.PREFETCH))

    def clear(self) -> bool:
        """Forget every block of every tier. Leases that are out end as usual, and publish none.

        When it returns, this stack finds nothing of before. Lower tiers are asked to forget it for
        good, all at the same time and for the longest of their deadlines.

        Returns:
            ``True`` when they have. A stack that is opened later then finds nothing of before.
        """
        # Lower tiers first: what is asked for from here on is a miss.
        answers = [(lower, lower.start_clear()) for lower in self.lower.tiers]
        self.front.clear()
        forgotten = [lower.finish_clear(answer) for lower, answer in answers]
        return all(forgotten)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every lower tier was offered what was stored; whether that came about."""
        return all(lower.write_behind.flush(timeout_s) for lower in self.lower.tiers)

    def stats(self) -> StackStats:
        """Counts at this moment."""
        lower = self.lower.tiers
        return StackStats(
            self.profile,
            (self.front.stats(),),
            tuple(tier.stats() for tier in lower),
            (self._named, *(tier.channel.tier_name for tier in lower)),
            self._loaded_blocks,
        )

    def take_durations(self) -> list[metrics.Duration]:
        """How long calls to tiers took, those since this was called last: the last thousand."""
        timers = [self._timer, *(lower.channel.health.timer for lower in self.lower.tiers)]
        return [duration for timer in timers for duration in timer.take()]

    def subscribe_events(self) -> list[tuple[TierName, BlockEventLog]]:
        """Have it written down from now on what comes to every tier and leaves it, L1 first.

        What lower tiers do by themselves shows when they are asked the next time. A journal grows
        until it is taken.
        """
        journals = [(self._named, BlockEventLog())]
        self.front.subscribe(journals[0][1])
        for lower in self.lower.tiers:
            journals.append((lower.channel.tier_name, BlockEventLog()))
            lower.channel.events = journals[-1][1]
        return journals

    def close(self, flush_s: float = 5.0) -> None:
        """Write what waits for ``flush_s`` seconds at most, and close every tier. Twice is allowed.

        All lower tiers together have one deadline, 2 seconds after ``flush_s``. A tier that hangs
        then is left open, with the memory that was lent to it, and a warning is logged; its threads
        do not keep the process from exiting.
        """
        metrics.unregister_stack(self)
        self.lower.close(flush_s)
        self.front.close()
        self.recorder.close()

    # Spans

    def _looked(self, span: Span, match: Match) -> None:
        if not span.is_recording():  # or the blocks of every look-up would be counted for nobody
            return
        requested = len(match.keys) - match.start
        asleep = self.lower.tiers and match.blocks < requested and not self.lower.accepts_calls
        telemetry.end_span(
            span,
            {
                telemetry.PROFILE: self.profile,
                telemetry.REQUESTED: requested,
                telemetry.HIT: match.blocks,
                telemetry.L1_HIT: match.sources.count(0) if match.sources else match.blocks,
                **self._tokens(match.blocks),
                **({telemetry.SKIP_REASON: telemetry.BREAKER_OPEN} if asleep else {}),
            },
        )

    def _tokens(self, blocks: int) -> dict[str, int]:
        return {telemetry.HIT_TOKENS: blocks * self._block_tokens} if self._block_tokens else {}

    def _ended(
        self, span: Span, outcome: str, requested: int, lease: Lease, failed: frozenset[bytes]
    ) -> None:
        good = len(lease.keys) - len(failed)
        telemetry.end_span(
            span,
            {
                telemetry.PROFILE: self.profile,
                telemetry.REQUESTED: requested,
                outcome: good,
                telemetry.PAYLOAD: good * self.block_nbytes,
                **({telemetry.FAILED: len(failed)} if failed else {}),
                **({telemetry.EVICTED: lease.evicted} if lease.evicted else {}),
            },
            error="copy_failed" if failed else None,
        )


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
