"""A stack of tiers, as an engine sees it: match, fetch, reserve.

1. Only the stack knows the prefix rule, the write policy, the spans, and the holders of leases.
2. ``match`` returns a value that ``fetch`` takes. The lease that ``fetch`` returns is pinned in L1
   and may be shorter than the match, never longer. Report only fetched blocks to an engine.
3. A call that needs no lower tier runs in the caller's thread and returns a completed future.
4. Blocks of lower tiers are promoted to L1 by ``kvcache.lower.promotion``, if loading them is
   expected to be faster than computing them.
5. When the lease of a store ends, its blocks are queued for write-behind to every lower tier. A
   tier with ``writes = "hot"`` gets a block only after its second use. Promoted blocks are not
   queued.
6. A span of ``kvcache.load`` or ``kvcache.store`` lasts as long as its lease, so that it covers the
   copies made under it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, TypeVar

from opentelemetry.context import Context

from kvcache import metrics, telemetry
from kvcache.closeable import Closeable
from kvcache.events import BlockEventLog
from kvcache.guards.front_tier import guard_front_tier
from kvcache.keys import Branch
from kvcache.lower.promotion import LowerTiers, Match
from kvcache.lower.tier import LowerTier
from kvcache.process import bind_to_process
from kvcache.replay.recorder import NULL_RECORDER, Recorder, guard_recorder
from kvcache.resume import GroupKeys, Resume
from kvcache.stack.fetch import LocalFetcher
from kvcache.stack.hints import StackHints
from kvcache.stack.leases import StackLeases
from kvcache.stack.prefetch import Prefetcher
from kvcache.stack.spans import StackSpans
from kvcache.stats import StackStats, TierName
from kvcache.tier import FrontTier, Lease

T = TypeVar("T")


class Stack(Closeable):
    """Tiers in order, the front tier first. Safe to call from several threads.

    Args:
        front: the tier that lends its memory (L1).
        lower: the tiers below it, nearest first.
        profile: the profile's name, for spans and stats.
        block_tokens: tokens of a block, for spans; 0 if unknown.
        name: the front tier's name in the profile.
        kind: the front tier's kind in the profile.
        announce: whether the front tier's blocks are announced to subscribers of events.
        clock: returns seconds.
        recorder: records the keys of every ``match``. A caller of ``fetch_local`` records them
            itself.

    Attributes:
        lower: the lower tiers, and the promotions from them.
        front_name: the front tier's name and kind.
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
        announce: bool = True,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder = NULL_RECORDER,
    ) -> None:
        self.front = guard_front_tier(front)
        if lower:
            self.front.disable_admission()
        self.recorder = guard_recorder(recorder)
        self.profile = profile
        self.front_name = TierName(name, kind or type(front).__name__)
        self._announces_front = announce
        self._timer = metrics.Timer(self.front_name)
        self._clock = clock
        self.lower = LowerTiers(self.front, lower, clock)
        self._spans = StackSpans(profile, block_tokens, self.front.block_nbytes, self.lower)
        self._leases = StackLeases(self.lower, self._spans)
        self._local = LocalFetcher(self.front, self._leases, self._spans, self._timer, clock)
        self._prefetcher = Prefetcher(self.front, self.lower, self._spans, clock)
        self._hints = StackHints(self.front, self._prefetcher)
        metrics.register_stack(self)
        bind_to_process(self)

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, of all ranks together."""
        return self.front.block_nbytes

    @property
    def announces(self) -> bool:
        """Whether any tier is announced to subscribers of events."""
        return self._announces_front or any(lower.announce for lower in self.lower.tiers)

    def match(
        self, keys: Sequence[bytes], start: int = 0, *, context: Context | None = None
    ) -> Future[Match]:
        """Find the longest prefix of ``keys[start:]`` that the tiers hold.

        A tier with ``lookup = "load"`` counts as holding every block; :meth:`fetch` finds out.

        Args:
            keys: a request's chain, from its first block.
            start: how many leading blocks the engine has in its own cache.
            context: the parent of the span; ``None`` for the current span.
        """
        self.recorder.record(keys)
        span, match = self._local.find(keys, start, context)
        if start + match.blocks == len(keys) or not self.lower.accepts_calls:
            self._spans.end_lookup(span, match)
            return _completed(match)

        def find() -> Match:
            found = self.lower.find(match, span)
            self._spans.end_lookup(span, found, loaded=False)
            return found

        return self.lower.submit(find)

    def fetch(self, match: Match, *, context: Context | None = None) -> Future[Lease]:
        """Promote the blocks of ``match`` to L1 and pin them until the lease ends.

        Returns:
            a future of a lease on the leading blocks of the match. It has fewer blocks, or none, if
            some were evicted or a tier did not return them in time.
        """
        if not any(match.sources):
            return _completed(self._local.pin(match, context))
        span = telemetry.start_span(telemetry.LOAD, context)

        def promote() -> Lease:
            return self._leases.begin_load(self.lower.promote(match, span), match.blocks, span)

        return self.lower.submit(promote)

    def fetch_local(
        self, keys: Sequence[bytes], start: int = 0, *, context: Context | None = None
    ) -> Lease:
        """Match and fetch the leading blocks of ``keys[start:]`` that L1 holds, without waiting."""
        span, match = self._local.find(keys, start, context)
        self._spans.end_lookup(span, match)
        return self._local.pin(match, context)

    def fetch_resume(
        self,
        groups: Sequence[GroupKeys],
        own: int,
        top: int,
        align_tokens: int,
        *,
        context: Context | None = None,
    ) -> Resume:
        """Find where a request can resume with blocks of L1, and pin these, without waiting.

        Args:
            groups: the request's groups.
            own: tokens that the engine has in its own cache.
            top: the most tokens to resume after.
            align_tokens: the resume point is a multiple of these.
            context: the parent of the spans; ``None`` for the current span.

        Returns:
            the last resume point at which L1 holds what every group needs.
        """
        return self._local.fetch_resume(groups, own, top, align_tokens, context)

    def prefetch_resume(
        self,
        groups: Sequence[GroupKeys],
        top: int,
        align_tokens: int,
        *,
        context: Context | None = None,
    ) -> Future[Match] | None:
        """Promote what a request needs at the last resume point that the tiers hold.

        Args:
            groups: the request's groups.
            top: the most tokens to resume after.
            align_tokens: the resume point is a multiple of these.
            context: the parent of the span; ``None`` for the current span.

        Returns:
            a future of a match of the first chain group's keys (without one, of the needed side
            blocks), done when all needed blocks are in L1; ``None`` if L1 has all of them already
            or no lower tier can be asked.
        """
        return self._prefetcher.prefetch_resume(groups, top, align_tokens, context)

    def prefetch(
        self, keys: Sequence[bytes], *, context: Context | None = None
    ) -> Future[Match] | None:
        """Promote the longest prefix of ``keys`` that lower tiers hold, without pinning it.

        Returns:
            a future of the match, done when its blocks are in L1; ``None`` if L1 has all of them
            already or no lower tier can be asked.
        """
        return self._prefetcher.prefetch(keys, context)

    def observe_compute(self, blocks: float, seconds: float, depth: float | None = None) -> None:
        """Record that the engine computed the KV cache of ``blocks`` in one step.

        The stack promotes blocks only if loading them is faster than computing them.

        Args:
            blocks: blocks that the step computed, over all prompts.
            seconds: the duration of the step.
            depth: the number of blocks before a computed block in its prompt, averaged over the
                computed blocks: a deeper block takes longer, since its attention reads more.
                ``None`` if one prompt was computed from its first block.
        """
        if blocks > 0:
            self.lower.compute_model.observe(blocks, seconds, depth)

    def observe_copy(
        self, operation: Literal["load", "store"], seconds: float, *, failed: bool = False
    ) -> None:
        """Record the duration of a copy by the engine: out of leased slots, or into them."""
        self._timer.record(operation, seconds, "copy_failed" if failed else "")

    def reserve(
        self,
        keys: Sequence[bytes],
        parent: bytes | None = None,
        *,
        context: Context | None = None,
    ) -> Lease:
        """Lend slots for those of ``keys`` that L1 lacks; ending the lease publishes them.

        Args:
            keys: a segment of one chain, in order.
            parent: the key that ``keys[0]`` continues; ``None`` for the first block of a chain.
            context: the parent of the span; ``None`` for the current span.
        """
        namespaces = self.lower.namespaces
        lease = self.front.reserve(keys, parent)
        if not lease.keys:
            return lease
        return self._leases.begin_store(lease, [(keys, parent)], namespaces, context)

    def reserve_branches(
        self,
        chains: Sequence[Branch],
        sides: Sequence[Branch] = (),
        *,
        context: Context | None = None,
    ) -> Lease:
        """Lend slots for the blocks of several segments that L1 lacks.

        Args:
            chains: the keys of each segment and its parent, as for :meth:`reserve`.
            sides: segments of side blocks. The parent of each is the block of a chain that it
                needs; a segment gets no slot if L1 lacks its parent.
            context: the parent of the span; ``None`` for the current span.

        Returns:
            one lease; its positions are those in the concatenated keys of all segments.
        """
        if len(chains) == 1 and not sides:
            return self.reserve(*chains[0], context=context)
        namespaces = self.lower.namespaces
        lease = self.front.reserve_branches(chains, sides)
        if not lease.keys:
            return lease
        return self._leases.begin_store(lease, [*chains, *sides], namespaces, context)

    def hint(
        self,
        keys: Sequence[bytes],
        *,
        done: bool = False,
        keep: float = 0.0,
        soon: bool = False,
        context: Context | None = None,
    ) -> None:
        """Record a hint on the future use of a chain. It orders evictions and promises nothing.

        Args:
            keys: the chain, in order; with ``done``, the segment that is not needed any more.
            done: the caller will not use these blocks again: they are evicted before all others,
                except blocks that are used again after this or have a child.
            keep: seconds during which other blocks are evicted first; for at most a quarter of L1.
            soon: the caller will use the blocks soon: those in lower tiers are promoted, without
                waiting.
            context: the caller's trace; ``None`` for the current one. The promotion has a trace of
                its own, with a link to this one.

        Raises:
            ValueError: for hints that contradict each other, or an impossible time.
        """
        self._hints.hint(keys, context, done=done, keep=keep, soon=soon)

    def hint_resume(
        self,
        groups: Sequence[GroupKeys],
        tokens: int,
        *,
        done: bool = False,
        keep: float = 0.0,
        soon: bool = False,
        context: Context | None = None,
    ) -> None:
        """Record a hint, as :meth:`hint` does, on the blocks of a request with several groups.

        ``done`` is for all of its blocks; ``keep`` for its chains, and what its last resume point
        needs; ``soon`` promotes as :meth:`prefetch_resume` does.

        Args:
            groups: the request's groups.
            tokens: how many tokens were computed.
            done, keep, soon, context: as for :meth:`hint`.
        """
        self._hints.hint_resume(groups, tokens, context, done=done, keep=keep, soon=soon)

    def clear(self) -> bool:
        """Remove every block of every tier. Leases that have not ended will publish nothing.

        When it returns, this stack finds no earlier block. The lower tiers forget the earlier
        blocks in parallel, within the longest of their deadlines.

        Returns:
            ``True`` if all lower tiers have done so; a later stack then finds none either.
        """
        # Lower tiers first, so that no block is promoted after L1 was cleared.
        pending = [(lower, lower.start_clear()) for lower in self.lower.tiers]
        self.front.clear()
        forgotten = [lower.finish_clear(call) for lower, call in pending]
        return all(forgotten)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all queued writes to lower tiers are done; ``False`` after the timeout."""
        return all(lower.write_behind.flush(timeout_s) for lower in self.lower.tiers)

    def stats(self) -> StackStats:
        """The counts at this moment."""
        lower = self.lower.tiers
        return StackStats(
            self.profile,
            (self.front.stats(),),
            tuple(tier.stats() for tier in lower),
            (self.front_name, *(tier.channel.tier_name for tier in lower)),
            self._leases.loaded_blocks,
        )

    def take_durations(self) -> list[metrics.Duration]:
        """Return the durations of tier calls since this was last called, at most 1024 per tier."""
        timers = [self._timer, *(lower.channel.health.timer for lower in self.lower.tiers)]
        return [duration for timer in timers for duration in timer.take()]

    def subscribe_events(self) -> list[tuple[TierName, BlockEventLog]]:
        """Log the events of every announced tier from now on, L1 first.

        A log grows until it is taken. A block that a lower tier removes by itself is logged when
        the stack next asks for it. A tier with ``announce = false`` logs nothing.
        """
        logs = []
        if self._announces_front:
            logs.append((self.front_name, BlockEventLog()))
            self.front.subscribe(logs[-1][1])
        for lower in self.lower.tiers:
            if lower.announce:
                logs.append((lower.channel.tier_name, BlockEventLog()))
                lower.channel.events = logs[-1][1]
        return logs

    def close(self, flush_s: float = 5.0) -> None:
        """Finish queued writes for at most ``flush_s`` seconds, then close every tier.

        All lower tiers together have 2 seconds more to close. A tier that still hangs is left
        open, its memory is not freed, and a warning is logged; its threads do not keep the process
        from exiting. Closing twice is allowed.
        """
        metrics.unregister_stack(self)
        self.lower.close(flush_s)
        self.front.close()
        self.recorder.close()


def _completed(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
