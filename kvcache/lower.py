"""A lower tier as the stack meets it: with threads, a deadline, a breaker and a bounded queue.

1. ``_begin`` and ``_store`` are the doors to a lower tier: one deadline, one breaker, one rule for
   failure, which is that whatever goes wrong is a miss or a decline, counted, never an exception.
2. A call that outlives its deadline goes on; the memory it was given stays under lease until then.
3. Loads go before stores.
4. What waits to be written is pinned in L1 and bounded in bytes. What does not fit is dropped, the
   tail of a chain first, and counted.
5. How long it takes to ask and to load is measured, for those who would rather compute.
6. A block is called by the namespace and its key, joined. ``clear`` takes a namespace that nobody
   else has: what was stored before is never found again, here or by others.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, Literal, TypeVar

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.calls import LOAD, STORE, Answer, Calls
from kvcache.health import Health
from kvcache.keys import DIGEST_NBYTES, join
from kvcache.pace import Pace
from kvcache.sizes import Size
from kvcache.stats import LowerStats
from kvcache.tier import FrontTier, Lease, Tier

T = TypeVar("T")
Parents = Mapping[bytes, bytes | None]
"""Blocks by key, in order, each with the key that it continues."""

PIECE_NBYTES: Final = (
    16 << 20
)  # of one call: what a deadline is for, and what a load may have to wait for
LOOK_AGAIN_S: Final = 5.0  # at a tier that was skipped


class Lower:
    """One tier below L1.

    Args:
        tier: what holds the bytes.
        name: its name in the profile.
        front: the L1 whose slots are read and filled.
        space: the namespace of the blocks.
        deadline_s: what a caller waits for one answer.
        queue: bytes of blocks that wait to be written; a quarter of L1 at most.
        calls: under way at once.
        writes: what is written: every block that is stored, or those that are used again.
        if_slower: what a request does when loading would take longer than computing: it computes,
            or it loads nonetheless.
        kind: what the profile calls the tier's class.
        clock: seconds.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        name: str,
        front: FrontTier,
        space: bytes,
        deadline_s: float = 1.0,
        queue: Size = Size(256 << 20),  # noqa: B008 - a number
        calls: int = 2,
        writes: Literal["all", "hot"] = "all",
        if_slower: Literal["compute", "load"] = "compute",
        kind: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier = tier
        self.name = name
        self.space = space
        self.deadline_s = deadline_s
        self.blocks_per_call = max(1, PIECE_NBYTES // front.block_nbytes)
        self._front = front
        # What waits is pinned: a slow tier may not take L1 from those who use it.
        self._queue_blocks = min(queue // front.block_nbytes, front.slab.slots // 4)
        self._hot = writes == "hot"
        self.waits_if_slower = if_slower == "load"
        self._whose = {telemetry.TIER: name, telemetry.KIND: kind or type(tier).__name__}
        # Where only what is used again is written: the others, their namespace and parent. As many
        # as L1 has slots: what has left L1 cannot be written any more.
        self._once: OrderedDict[bytes, tuple[bytes, bytes | None]] = OrderedDict()
        self._health = Health(name, self._whose, clock)
        self._clock = clock
        self._asking, self._loading = Pace(), Pace()
        self._seen_slow = 0.0  # when it was last looked at for having been skipped
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._waiting_blocks = 0
        self._counts = dict.fromkeys(LowerStats.__slots__, 0)
        self._closed = False
        self._calls = Calls(name, calls)

    @property
    def asleep(self) -> bool:
        """Whether asking would be answered with nothing at once, since the breaker is open."""
        return self._health.breaker.idle

    # Questions, from threads of the stack

    def contains(self, keys: Sequence[bytes], span: Span) -> list[bool]:
        """Which of ``keys`` the tier holds, by its own account; nothing when it cannot say.

        This and the other questions have a span below the ``span`` of what they are asked for.
        """
        names = [join(self.space, key) for key in keys]
        asking, begun = telemetry.below(span, telemetry.TIER_CONTAINS), self._clock()
        answer = self._begin(
            "contains", lambda: self.tier.contains(names), len(names), asking, lambda: None
        )
        given = answer.wait()
        held = [False] * len(keys)
        if given is not None:
            held = [bool(each) for each in given]
            self._asking.told(len(keys), self._clock() - begun)
        self._count(lookup_blocks=len(keys), hit_blocks=sum(held))
        self._asked(asking, [answer], {telemetry.REQUESTED: len(keys), telemetry.HIT: sum(held)})
        return held

    def load(self, lease: Lease, span: Span) -> Answer[int]:
        """Begin to fill ``lease``, a lease to fill, with what the tier has of its keys.

        The lease ends with the call, however late that is, and at once if the call is not made.
        ``span`` is that of the loads of this tier for one request; :meth:`climbed` ends it.
        """
        names = [join(self.space, key) for key in lease.keys]

        def fill() -> Sequence[int]:
            written: Sequence[int] = ()
            try:
                written = self.tier.load(names, lease.views)
                return written
            finally:
                if len(written) != len(lease):
                    written = [0] * len(lease)  # no telling which is whose
                whole = self._front.block_nbytes
                missed = [k for k, n in zip(lease.keys, written, strict=True) if n != whole]
                self._count(loaded_blocks=len(lease) - len(missed), missed_blocks=len(missed))
                lease.end(failed=missed)

        return self._begin("load", fill, len(lease), span, lambda: lease.end(lease.keys))

    def climbed(
        self, answers: Sequence[Answer[int]], wanted: int, span: Span, *, late: bool
    ) -> None:
        """The loads of ``wanted`` blocks for one request came, or were ``late`` and given up."""
        loaded = sum(answer.came(self._front.block_nbytes) for answer in answers)
        counts = {
            telemetry.REQUESTED: wanted,
            telemetry.HIT: loaded,
            telemetry.PAYLOAD: loaded * self._front.block_nbytes,
        }
        self._asked(span, answers, counts, telemetry.SLOWER if late else "")

    def took(self, answers: Sequence[Answer[int]], seconds: float) -> None:
        """The loads for one request took so long, from the first call to the last answer."""
        asked = sum(answer.count for answer in answers)
        came = sum(answer.came(self._front.block_nbytes) for answer in answers)
        hangs = not all(answer.future.done() for answer in answers)
        if asked and (came == asked or hangs):  # a miss is fast, and tells nothing
            self._loading.told(asked, seconds)

    def _begin(
        self,
        verb: str,
        call: Callable[[], Sequence[T]],
        count: int,
        span: Span,
        unasked: Callable[[], None],
    ) -> Answer[T]:
        """Have ``call`` made in a thread of this tier; the arguments are those of ``Answer``."""
        answer: Answer[T] = Answer(self._health, self.deadline_s, verb, count, unasked, span)
        if self._closed or not self._health.breaker.allows():
            answer.refuse()
        else:
            self._calls.put(LOAD, lambda: answer.run(call))
        return answer

    def _asked(
        self,
        span: Span,
        answers: Sequence[Answer[T]],
        counts: Mapping[str, int],
        skip: str = "",
    ) -> None:
        """End the span of questions to the tier."""
        if not span.is_recording():
            return
        errors = [answer.error for answer in answers if answer.error]
        if any(answer.future.cancelled() and not answer.error for answer in answers):
            skip = telemetry.BREAKER_OPEN
        telemetry.end(
            span,
            {
                **self._whose,
                **counts,
                telemetry.QUEUED: max((answer.queued_s for answer in answers), default=0.0),
                **({telemetry.SKIP: skip} if skip else {}),
            },
            error=errors[0] if errors else None,
        )

    # Whether to ask it at all

    def asking_takes(self, blocks: int) -> float:
        """Seconds it takes to ask for ``blocks``, at the least; 0 if unknown, or no matter."""
        return 0.0 if self.waits_if_slower else self._asking.least(blocks) or 0.0

    def loading_takes(self, blocks: int) -> float:
        """Seconds it takes to load ``blocks``, at the least; 0 if unknown, or no matter."""
        return 0.0 if self.waits_if_slower else self._loading.least(blocks) or 0.0

    def skipped(self, name: str, blocks: int, span: Span) -> None:
        """``blocks`` are computed, since that takes less time than what span ``name`` is of."""
        self._count(skipped_blocks=blocks)
        if span.is_recording():
            why: telemetry.Attributes = {
                telemetry.SKIPPED: blocks,
                telemetry.SKIP: telemetry.SLOWER,
            }
            span.set_attributes(why)
            telemetry.end(telemetry.below(span, name), {**self._whose, **why})

    def look_again(self) -> bool:
        """Whether it is time to see if the tier is still slow; ``True`` to one who asks."""
        with self._lock:
            now = self._clock()
            due = now - self._seen_slow >= LOOK_AGAIN_S
            if due:
                self._seen_slow = now
            return due

    # Writing, behind the engine's back

    def stored(self, parents: Parents, space: bytes, cause: Span) -> None:
        """An engine stored blocks, whose slots were reserved when the namespace was ``space``.

        This and the others below get the span that is the ``cause``, which has not ended.
        """
        if not self._hot:
            self.write(parents, space, cause)
            return
        with self._lock:
            self._counts["once_blocks"] += len(parents)
            self._once.update({key: (space, parent) for key, parent in parents.items()})
            while len(self._once) > self._front.slab.slots:
                self._once.popitem(last=False)

    def used(self, keys: Sequence[bytes], failed: Collection[bytes], cause: Span) -> None:
        """``keys`` but for ``failed`` were used, READY in L1: what was kept back is written now."""
        if not self._once:
            return
        with self._lock:
            good = [key for key in keys if key in self._once and key not in failed]
            kept = {key: self._once.pop(key) for key in good}
            self._counts["once_blocks"] -= len(kept)
        for space in dict.fromkeys(space for space, _ in kept.values()):
            its = {key: parent for key, (of, parent) in kept.items() if of == space}
            self.write(its, space, cause)

    def write(self, parents: Parents, space: bytes, cause: Span) -> None:
        """Queue blocks, READY in L1, to be written: as many of the first as there is room for.

        ``space`` is the namespace when their slots were reserved: it may be another by now.
        """
        keys = list(parents)
        if not keys:
            return
        with self._lock:
            room = 0 if self.asleep or self._closed else self._queue_blocks
            taken = max(0, min(len(keys), room - self._waiting_blocks))
            self._waiting_blocks += taken
        if dropped := len(keys) - taken:
            self._count(dropped_blocks=dropped)
            if cause.is_recording():
                event: telemetry.Attributes = {**self._whose, telemetry.DROPPED: dropped}
                cause.add_event(telemetry.BLOCKS_DROPPED, event)
        for at in range(0, taken, self.blocks_per_call):
            piece = keys[at : min(at + self.blocks_per_call, taken)]
            lease = self._front.pin(piece)
            gone = len(piece) - len(lease)  # dropped from L1 as not to be trusted
            self._count(dropped_blocks=gone)
            self._written(gone)
            self._calls.put(STORE, partial(self._store, lease, parents, space, cause))

    def _store(self, lease: Lease, parents: Parents, space: bytes, cause: Span) -> None:
        """Offer what is new to the tier of the blocks under ``lease``, and end it."""
        if self._closed or not self._health.breaker.allows():
            self._count(dropped_blocks=len(lease))
            lease.end()
            self._written(len(lease))
            return
        span, begun = telemetry.after(cause, telemetry.TIER_STORE), self._clock()
        new, stored, error, why = len(lease), 0, "", ""
        try:
            views = dict(zip(lease.keys, lease.views, strict=True))
            with telemetry.within(span):
                held = self.tier.contains([join(space, key) for key in lease.keys])
                if len(held) != len(lease):
                    raise ValueError(f"{len(held)} answers to {len(lease)} keys")
                unknown = [key for key, known in zip(lease.keys, held, strict=True) if not known]
                for stretch in _stretches(unknown, parents):
                    after = parents[stretch[0]]
                    taken = self.tier.store(
                        [join(space, key) for key in stretch],
                        [views[key] for key in stretch],
                        after and join(space, after),
                    )
                    if len(taken) != len(stretch):
                        raise ValueError(f"{len(taken)} answers to {len(stretch)} keys")
                    stored += sum(map(bool, taken))
            new = len(unknown)
        except Exception as wrong:  # noqa: BLE001 - whatever a tier does wrong is a decline
            error, why = type(wrong).__name__, str(wrong)
        finally:
            lease.end()
        if not error and self._clock() - begun > self.deadline_s:
            error, why = "timeout", "it took longer than the deadline"
        counts = {
            "known_blocks": len(lease) - new,
            "stored_blocks": stored,
            "declined_blocks": new - stored,
        }
        self._count(**counts)
        if error:
            self._health.failed("store", error, why, span)
        else:
            self._health.succeeded(span)
        telemetry.end(
            span,
            {
                **self._whose,
                telemetry.REQUESTED: len(lease),
                telemetry.STORED: stored,
                telemetry.KNOWN: len(lease) - new,
                telemetry.PAYLOAD: stored * self._front.block_nbytes,
                **({telemetry.FAILED: new - stored} if new > stored else {}),
            },
            error=error or None,
        )
        self._written(len(lease))  # last: who waits for that finds all of the above

    def clear(self) -> None:
        """Find nothing again of what was stored until now."""
        self.space = os.urandom(len(self.space) or DIGEST_NBYTES)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be written; whether that came about in time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._waiting_blocks, timeout_s)

    def _written(self, blocks: int) -> None:
        with self._idle:
            self._waiting_blocks -= blocks
            if not self._waiting_blocks:
                self._idle.notify_all()

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, by in more.items():
                self._counts[name] += by

    def stats(self) -> LowerStats:
        """Counts at this moment."""
        with self._lock:
            queued = self._waiting_blocks * self._front.block_nbytes
            now = {"queued_nbytes": queued, "errors": self._health.errors}
            return LowerStats(**(self._counts | now))

    def close(self, flush_s: float) -> None:
        """Write what waits, for ``flush_s`` at most; what still waits then is dropped, counted."""
        self.flush(flush_s)
        self._closed = True
        self._calls.do_writes_here()  # they drop what they have
        self._calls.close(self.deadline_s)
        self.tier.close()


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
