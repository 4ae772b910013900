"""A lower tier as the stack meets it: with threads, a deadline, a breaker and a bounded queue.

1. ``begin`` and ``_store`` are the doors to a lower tier: one deadline, one breaker, one rule for
   failure, which is that whatever goes wrong is a miss or a decline, counted, never an exception.
2. A call that outlives its deadline goes on; the memory it was given stays under lease until then.
3. Loads go before stores: a thread takes the first load that waits, a store only when none does.
4. What waits to be written is pinned in L1 and bounded in bytes. What does not fit is dropped, the
   tail of a chain first, and counted.
5. A block is called by the namespace and its key, joined. ``clear`` takes a namespace that nobody
   else has: what was stored before is never found again, here or by others.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, PriorityQueue
from typing import Generic, Literal, TypeVar

from kvcache.breaker import Breaker
from kvcache.keys import DIGEST_NBYTES, join
from kvcache.sizes import Size
from kvcache.tier import FrontTier, Lease, Tier

log = logging.getLogger(__name__)

T = TypeVar("T")

LOAD, STORE, STOP = 0, 1, 2  # in the order in which they are taken
PIECE_NBYTES = 16 << 20  # of one call: what a deadline is for, and what a load may have to wait for


@dataclass(frozen=True, slots=True)
class LowerStats:
    """What a lower tier was asked and did since it was opened. Most counts are in blocks."""

    lookup_blocks: int
    hit_blocks: int  # of these held
    loaded_blocks: int
    missed_blocks: int  # said to be held, and not loaded
    stored_blocks: int
    known_blocks: int  # not written, since the tier holds them
    declined_blocks: int  # offered, and not taken
    dropped_blocks: int  # never offered: the queue was full, or the breaker open
    once_blocks: int  # not offered so far, since they were not used again
    queued_nbytes: int
    errors: int  # calls that failed or came late


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
        # Where only what is used again is written: the others, and their namespace. As many as L1
        # has slots: what has left L1 cannot be written any more.
        self._once: OrderedDict[bytes, bytes] = OrderedDict()
        self._breaker = Breaker(clock)
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], None]]] = PriorityQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._waiting_blocks = 0
        self._counts = dict.fromkeys(LowerStats.__slots__, 0)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kvcache-{name}-{n}", daemon=True)
            for n in range(calls)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def asleep(self) -> bool:
        """Whether asking would be answered with nothing at once, since the breaker is open."""
        return self._breaker.idle

    # Questions, from threads of the stack

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of ``keys`` the tier holds, by its own account; nothing when it cannot say."""
        names = [join(self.space, key) for key in keys]
        answer = self.begin("contains", lambda: self.tier.contains(names), len(names)).wait()
        held = [bool(each) for each in answer] if answer is not None else [False] * len(keys)
        self._count(lookup_blocks=len(keys), hit_blocks=sum(held))
        return held

    def load(self, lease: Lease) -> Answer[int]:
        """Begin to fill ``lease``, a lease to fill, with what the tier has of its keys.

        The lease ends with the call, however late that is, and at once if the call is not made.
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

        return self.begin("load", fill, len(lease), lambda: lease.end(lease.keys))

    def begin(
        self,
        verb: str,
        call: Callable[[], Sequence[T]],
        count: int,
        unasked: Callable[[], None] = lambda: None,
    ) -> Answer[T]:
        """Have ``call`` made in a thread of this tier.

        Args:
            verb: for messages.
            call: goes to the tier.
            count: how many answers are right; any other number is a failure.
            unasked: called when ``call`` has not been made and will not be.
        """
        answer: Answer[T] = Answer(self, verb, count, unasked)
        if self._closed or not self._breaker.allows():
            answer.refuse()
        else:
            self._put(LOAD, lambda: answer.run(call))
        return answer

    # Writing, behind the engine's back

    def stored(self, keys: Sequence[bytes], space: bytes) -> None:
        """An engine stored ``keys``, whose slots were reserved when the namespace was ``space``."""
        if not self._hot:
            self.write(keys, space)
            return
        with self._lock:
            self._counts["once_blocks"] += sum(key not in self._once for key in keys)
            self._once.update(dict.fromkeys(keys, space))
            while len(self._once) > self._front.slab.slots:
                self._once.popitem(last=False)

    def used(self, keys: Sequence[bytes], failed: Collection[bytes]) -> None:
        """``keys`` but for ``failed`` were used, READY in L1: what was kept back is written now."""
        if not self._once:
            return
        with self._lock:
            good = [key for key in keys if key in self._once and key not in failed]
            spaces = {key: self._once.pop(key) for key in good}
            self._counts["once_blocks"] -= len(spaces)
        for space in dict.fromkeys(spaces.values()):
            self.write([key for key, its in spaces.items() if its == space], space)

    def write(self, keys: Sequence[bytes], space: bytes) -> None:
        """Queue ``keys``, READY in L1, to be written: as many of the first as there is room for.

        ``space`` is the namespace when their slots were reserved: it may be another by now.
        """
        if not keys:
            return
        with self._lock:
            room = 0 if self.asleep or self._closed else self._queue_blocks
            taken = max(0, min(len(keys), room - self._waiting_blocks))
            self._waiting_blocks += taken
        self._count(dropped_blocks=len(keys) - taken)
        for at in range(0, taken, self.blocks_per_call):
            piece = keys[at : min(at + self.blocks_per_call, taken)]
            lease = self._front.pin(piece)
            gone = len(piece) - len(lease)  # dropped from L1 as not to be trusted
            self._count(dropped_blocks=gone)
            self._written(gone)
            self._put(STORE, partial(self._store, lease, space))

    def _store(self, lease: Lease, space: bytes) -> None:
        started = time.monotonic()
        try:
            if self._closed or not self._breaker.allows():
                self._count(dropped_blocks=len(lease))
                return
            names, views = [join(space, key) for key in lease.keys], lease.views
            held = self.tier.contains(names)
            new = [at for at, known in enumerate(held) if not known]
            stored = self.tier.store([names[at] for at in new], [views[at] for at in new])
            if len(held) != len(lease) or len(stored) != len(new):
                raise ValueError(f"{len(held)} and {len(stored)} answers to {len(lease)} keys")
        except Exception as error:  # noqa: BLE001 - whatever a tier does wrong is a decline
            self._count(declined_blocks=len(lease))
            self.failed("store", f"{type(error).__name__}: {error}")
            return
        finally:
            self._written(len(lease))
            lease.end()
        self._count(
            known_blocks=len(lease) - len(new),
            stored_blocks=sum(map(bool, stored)),
            declined_blocks=len(new) - sum(map(bool, stored)),
        )
        if time.monotonic() - started > self.deadline_s:
            self.failed("store", "it took longer than the deadline")
        else:
            self.succeeded()

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

    def _drop_waiting(self) -> None:
        loads = []
        with suppress(Empty):
            while True:
                priority, _, job = self._jobs.get_nowait()
                if priority == STORE:
                    job()  # closed by now, it drops what it has
                else:
                    loads.append(job)
        for job in loads:
            self._put(LOAD, job)

    # Threads

    def _put(self, priority: int, job: Callable[[], None]) -> None:
        self._jobs.put((priority, next(self._order), job))

    def _work(self) -> None:
        while True:
            priority, _, job = self._jobs.get()
            if priority == STOP:
                return
            job()

    def succeeded(self) -> None:
        """A call to the tier ended well."""
        if self._breaker.succeeded():
            log.warning("kvcache: tier %s answers again", self.name)

    def failed(self, verb: str, why: str) -> None:
        """A call to the tier failed or came late."""
        self._count(errors=1)
        if self._breaker.failed():
            log.warning(
                "kvcache: tier %s is not asked for a while: %s failed (%s)", self.name, verb, why
            )
        else:
            log.debug("kvcache: tier %s: %s failed (%s)", self.name, verb, why)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, by in more.items():
                self._counts[name] += by

    def stats(self) -> LowerStats:
        """Counts at this moment."""
        with self._lock:
            queued = self._waiting_blocks * self._front.block_nbytes
            return LowerStats(**(self._counts | {"queued_nbytes": queued}))

    def close(self, flush_s: float) -> None:
        """Write what waits, for ``flush_s`` at most; what still waits then is dropped, counted."""
        self.flush(flush_s)
        self._closed = True
        self._drop_waiting()  # here, since the threads may hang
        for _ in self._threads:
            self._put(STOP, lambda: None)
        for thread in self._threads:
            thread.join(timeout=self.deadline_s)
        self.tier.close()


class Answer(Generic[T]):
    """What a lower tier will say to one question."""

    def __init__(self, lower: Lower, verb: str, count: int, unasked: Callable[[], None]) -> None:
        self._lower = lower
        self._verb = verb
        self._count = count
        self._unasked = unasked
        self._future: Future[Sequence[T]] = Future()

    def refuse(self) -> None:
        """Nobody will be asked."""
        if self._future.cancel():
            self._unasked()

    def run(self, call: Callable[[], Sequence[T]]) -> None:
        """Make the call, unless it was refused."""
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            self._future.set_result(call())
        except Exception as error:  # noqa: BLE001 - the one who waits is told
            self._future.set_exception(error)

    def wait(self) -> Sequence[T] | None:
        """The answers, one per key; ``None`` when there are none by the deadline. Call it once."""
        lower, deadline_s = self._lower, self._lower.deadline_s
        try:
            given = self._future.result(timeout=deadline_s)
            if len(given) != self._count:
                raise ValueError(f"{len(given)} answers to {self._count} keys")
        except CancelledError:
            return None
        except TimeoutError:
            self.refuse()  # if it has not begun
            lower.failed(self._verb, f"no answer in {deadline_s:.3g} s")
            return None
        except Exception as error:  # noqa: BLE001 - whatever a tier does wrong is a miss
            lower.failed(self._verb, f"{type(error).__name__}: {error}")
            return None
        lower.succeeded()
        return given
