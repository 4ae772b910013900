"""A lower tier as the stack meets it: asked with a deadline, and written to through a queue.

1. Two doors lead to a tier: ``_begin`` here, ``_offer`` of its writes. One deadline, one breaker,
   one rule for failure: whatever the tier raises or answers, a failure is a miss or a decline,
   counted, never an exception.
2. A call that outlives its deadline goes on; the memory it was given stays under lease until then.
3. Loads go before stores.
4. How long it takes to ask and to load is measured, for those who would rather compute.
5. A block is called by the namespace and its key, joined. ``clear`` takes a namespace that no other
   stack has, so that this one finds nothing of before; and has the tier forget the namespace of
   before, so that a stack opened later finds nothing either. That holds from when ``cleared``
   returns ``True``, however the process ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, TypeVar

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.guards.front_tier import guard_front_tier
from kvcache.lower.channel import Channel
from kvcache.lower.latency import LatencyModel
from kvcache.lower.worker_pool import LOAD, PendingCall
from kvcache.lower.write_behind import WriteBehind
from kvcache.process import bind_to_process
from kvcache.sizes import Size
from kvcache.stats import LowerStats
from kvcache.tier import FrontTier, Lease, Tier

log = logging.getLogger(__name__)

T = TypeVar("T")

PIECE_NBYTES: Final = 16 << 20  # of one call: what a deadline is for, and a load may wait for
LOOK_AGAIN_S: Final = 5.0  # at a tier that was skipped
_DEADLINE_S: Final = 3600
_CALLS: Final = 1024


class LowerTier:
    """One tier below L1.

    Args:
        tier: what holds the bytes.
        name: its name in the profile.
        front: the L1 whose slots are read and filled.
        space: the namespace of the blocks.
        about: says for people what the namespace is, as JSON.
        deadline_s: what a caller waits for one answer.
        queue: bytes of blocks that wait to be written; a quarter of L1 at most.
        calls: under way at once.
        writes: what is written: every block that is stored, or those that are used again.
        if_slower: what a request does when loading would take longer than computing: it computes,
            or it loads nonetheless.
        kind: what the profile calls the tier's class.
        clock: seconds.

    Raises:
        ValueError: for a deadline or a number of calls that cannot be.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        name: str,
        front: FrontTier,
        namespace: bytes,
        about: str = "",
        deadline_s: float = 1.0,
        queue: Size = Size(256 << 20),  # noqa: B008 - a number
        calls: int = 2,
        writes: Literal["all", "hot"] = "all",
        if_slower: Literal["compute", "load"] = "compute",
        kind: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < deadline_s <= _DEADLINE_S:  # nan is not
            raise ValueError(
                f"deadline_s is {deadline_s}; it takes seconds above 0, to {_DEADLINE_S}"
            )
        if not 1 <= calls <= _CALLS:
            raise ValueError(f"calls is {calls}; it must be 1 to {_CALLS}")
        front = guard_front_tier(front)
        self.name = name
        self.waits_if_slower = if_slower == "load"
        self.channel = Channel(
            tier,
            name=name,
            kind=kind or type(tier).__name__,
            namespace=namespace,
            about=about,
            deadline_s=deadline_s,
            blocks_per_call=max(1, PIECE_NBYTES // front.block_nbytes),
            calls=calls,
            clock=clock,
        )
        wanted, most = queue // front.block_nbytes, front.slab.slots // 4
        self.writes = WriteBehind(
            self.channel,
            front,
            min(wanted, most),
            hot=writes == "hot",
            enlarge="the tier's queue" if wanted < most else "L1's capacity (it holds 1/4 of L1)",
        )
        self._front = front
        self._asking, self._loading = LatencyModel(), LatencyModel()
        self._lock = threading.Lock()
        self._seen_slow = 0.0  # when it was last looked at for having been skipped
        bind_to_process(self)

    @property
    def namespace(self) -> bytes:
        """The namespace of the blocks that are asked for."""
        return self.channel.namespace

    # Questions, from threads of the stack

    def contains(self, keys: Sequence[bytes], span: Span) -> list[bool]:
        """Which of ``keys`` the tier holds, by its own account; nothing when it cannot say.

        This and the other questions have a span below the ``span`` of what they are asked for.
        """
        namespace = self.namespace
        asking, begun = telemetry.start_child(span, telemetry.TIER_CONTAINS), self.channel.clock()
        answer = self._begin(
            "contains",
            lambda: self.channel.contains(namespace, keys),
            len(keys),
            asking,
            lambda: None,
        )
        given = answer.wait()
        held = [False] * len(keys)
        if given is not None:
            held = list(given)
            self._asking.observe(len(keys), self.channel.clock() - begun)
        self.channel.count(lookup_blocks=len(keys), hit_blocks=sum(held))
        self._asked(asking, [answer], {telemetry.REQUESTED: len(keys), telemetry.HIT: sum(held)})
        return held

    def load(self, lease: Lease, span: Span) -> PendingCall[int]:
        """Begin to fill ``lease``, a lease to fill, with what the tier has of its keys.

        The lease ends with the call, however late that is, and at once if the call is not made.
        ``span`` is that of the loads of this tier for one request; :meth:`climbed` ends it.
        """
        namespace, whole = self.namespace, self._front.block_nbytes

        def fill() -> Sequence[int]:
            missed = lease.keys
            try:
                written = self.channel.load(namespace, lease.keys, lease.views)
                missed = [k for k, n in zip(lease.keys, written, strict=True) if n != whole]
                return written
            finally:
                self.channel.count(
                    loaded_blocks=len(lease) - len(missed), missed_blocks=len(missed)
                )
                lease.end(failed=missed)

        return self._begin("load", fill, len(lease), span, lambda: lease.end(lease.keys))

    def climbed(
        self, answers: Sequence[PendingCall[int]], wanted: int, span: Span, *, late: bool
    ) -> None:
        """The loads of ``wanted`` blocks for one request came, or were ``late`` and given up."""
        loaded = sum(answer.came(self._front.block_nbytes) for answer in answers)
        counts = {
            telemetry.REQUESTED: wanted,
            telemetry.HIT: loaded,
            telemetry.PAYLOAD: loaded * self._front.block_nbytes,
        }
        self._asked(span, answers, counts, telemetry.SLOWER if late else "")

    def took(self, answers: Sequence[PendingCall[int]], seconds: float) -> None:
        """The loads for one request took so long, from the first call to the last answer."""
        asked = sum(answer.count for answer in answers)
        came = sum(answer.came(self._front.block_nbytes) for answer in answers)
        hangs = not all(answer.future.done() for answer in answers)
        if asked and (came == asked or hangs):  # a miss is fast, and tells nothing
            self._loading.observe(asked, seconds)

    def _begin(
        self,
        verb: str,
        call: Callable[[], Sequence[T]],
        count: int,
        span: Span,
        unasked: Callable[[], None],
    ) -> PendingCall[T]:
        """Queue ``call`` for a thread of this tier; the arguments are ``PendingCall``'s."""
        answer: PendingCall[T] = PendingCall(
            self.channel.health, self.channel.deadline_s, verb, count, unasked, span
        )
        if self.channel.closed or not self.channel.health.breaker.allows():
            answer.refuse()
        else:
            self.channel.calls.put(LOAD, lambda: answer.run(call), answer.refuse)
        return answer

    def _asked(
        self,
        span: Span,
        answers: Sequence[PendingCall[T]],
        counts: Mapping[str, int],
        skip: str = "",
    ) -> None:
        """End the span of questions to the tier."""
        if not span.is_recording():
            return
        errors = [answer.error for answer in answers if answer.error]
        if any(answer.future.cancelled() and not answer.error for answer in answers):
            skip = telemetry.BREAKER_OPEN
        telemetry.end_span(
            span,
            {
                **self.channel.whose,
                **counts,
                telemetry.QUEUED: max((answer.queued_s for answer in answers), default=0.0),
                **({telemetry.SKIP_REASON: skip} if skip else {}),
            },
            error=errors[0] if errors else None,
        )

    # Whether to ask it at all

    def asking_takes(self, blocks: int) -> float:
        """Seconds it takes to ask for ``blocks``, at the least; 0 if unknown, or no matter."""
        return 0.0 if self.waits_if_slower else self._asking.optimistic(blocks) or 0.0

    def loading_takes(self, blocks: int) -> float:
        """Seconds it takes to load ``blocks``, at the least; 0 if unknown, or no matter."""
        return 0.0 if self.waits_if_slower else self._loading.optimistic(blocks) or 0.0

    def skipped(self, name: str, blocks: int, span: Span) -> None:
        """``blocks`` are computed, since that takes less time than what span ``name`` is of."""
        self.channel.count(skipped_blocks=blocks)
        if span.is_recording():
            why: telemetry.Attributes = {
                telemetry.SKIPPED: blocks,
                telemetry.SKIP_REASON: telemetry.SLOWER,
            }
            span.set_attributes(why)
            telemetry.end_span(telemetry.start_child(span, name), {**self.channel.whose, **why})

    def look_again(self) -> bool:
        """Whether it is time to see if the tier is still slow; ``True`` to one who asks."""
        with self._lock:
            now = self.channel.clock()
            due = now - self._seen_slow >= LOOK_AGAIN_S
            if due:
                self._seen_slow = now
            return due

    def clear(self) -> PendingCall[bool]:
        """Find nothing again of what was stored until now, and begin to have the tier forget it."""
        self.channel.clear()
        return self._begin(
            "forget", lambda: [self.channel.spaces.forget()], 1, INVALID_SPAN, lambda: None
        )

    def cleared(self, answer: PendingCall[bool]) -> bool:
        """Whether the tier has forgotten, within its deadline, what a stack opened later may find.

        If not, a warning is logged, and the tier is asked again before each write.
        """
        if answer.wait() == [True] or not self.channel.spaces.unforgotten:
            return True
        log.warning(
            "kvcache: tier %s: a reset was not written (%s); an engine that is started later may "
            "find blocks from before it",
            self.name,
            answer.error or ("not asked" if answer.future.cancelled() else "not supported"),
        )
        return False

    def stats(self) -> LowerStats:
        """Counts at this moment."""
        size = self._front.block_nbytes
        mine = {"block_nbytes": size, "queued_nbytes": self.writes.waiting_blocks * size}
        return LowerStats(**(self.channel.counts() | mine))

    def close(self, flush_until: float, until: float) -> None:
        """Write what waits and close the tier; both times are of ``time.monotonic``.

        What still waits at ``flush_until`` is dropped and counted. By ``until`` the tier's own
        ``close`` has begun; it ends when the tier lets it. Raises TierError where it fails.
        """
        self.writes.flush(max(0.0, flush_until - time.monotonic()))
        self.channel.close(max(0.0, until - time.monotonic()))
