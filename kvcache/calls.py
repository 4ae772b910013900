"""Calls to one lower tier, made in threads of their own: loads first, and a wait with an end.

Always true here:

* A thread takes the first question that waits, a write only when none does.
* Every question is answered, refused or failed exactly once. Who waits is told by the deadline; the
  call itself goes on, since it cannot be ended from outside.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from queue import Empty, PriorityQueue
from typing import Generic, TypeVar

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.health import Health
from kvcache.process import own

T = TypeVar("T")

LOAD, STORE, STOP = 0, 1, 2  # in the order in which they are taken


class Calls:
    """Threads that make what calls are put to them.

    Args:
        name: of the tier, for the threads.
        threads: calls under way at once.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], None]]] = PriorityQueue()
        self._order = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, name=f"kvcache-{name}-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        own(self)

    def put(self, priority: int, job: Callable[[], None]) -> None:
        """Have ``job`` done, after all that were put with a lower number before it is taken."""
        self._jobs.put((priority, next(self._order), job))

    def do_writes_here(self) -> None:
        """Take the writes that wait from the threads, which may hang, and do them at once."""
        loads = []
        with suppress(Empty):
            while True:
                priority, _, job = self._jobs.get_nowait()
                if priority == STORE:
                    job()
                else:
                    loads.append(job)
        for job in loads:
            self.put(LOAD, job)

    def close(self, timeout_s: float) -> None:
        """Have the threads end when nothing waits; wait ``timeout_s`` at most for each."""
        for _ in self._threads:
            self.put(STOP, lambda: None)
        for thread in self._threads:
            thread.join(timeout=timeout_s)

    def _work(self) -> None:
        while True:
            priority, _, job = self._jobs.get()
            if priority == STOP:
                return
            job()


class Answer(Generic[T]):
    """What a lower tier will say to one question.

    Args:
        health: of the tier, which is told how it went.
        deadline_s: what is waited for it.
        verb: for messages.
        count: how many answers are right; any other number is a failure.
        unasked: called when the call has not been made and will not be.
        span: the current one of the thread that makes the call; has the events of its end.
    """

    def __init__(
        self,
        health: Health,
        deadline_s: float,
        verb: str,
        count: int,
        unasked: Callable[[], None],
        span: Span,
    ) -> None:
        self._health = health
        self._deadline_s = deadline_s
        self._verb = verb
        self.count = count
        self._unasked = unasked
        self._span = span
        self._begun = time.monotonic()
        self.queued_s = 0.0  # until the call was made
        self.error = ""  # what went wrong, in a word
        self.future: Future[Sequence[T]] = Future()

    def refuse(self) -> None:
        """Nobody will be asked."""
        if self.future.cancel():
            self._unasked()

    def run(self, call: Callable[[], Sequence[T]]) -> None:
        """Make the call, unless it was refused."""
        if not self.future.set_running_or_notify_cancel():
            return
        begun = time.monotonic()
        self.queued_s = begun - self._begun
        try:
            with telemetry.within(self._span):
                given = call()
        except Exception as error:  # noqa: BLE001 - the one who waits is told
            self._took(time.monotonic() - begun, type(error).__name__)
            self.future.set_exception(error)
        else:
            self._took(time.monotonic() - begun, "")
            self.future.set_result(given)

    def _took(self, seconds: float, error: str) -> None:
        late = self.queued_s + seconds > self._deadline_s
        self._health.timer.took(self._verb, seconds, error or ("timeout" if late else ""))

    def came(self, right: T) -> int:
        """How many answers are ``right``; none if there is no telling yet."""
        if not self.future.done() or self.future.cancelled() or self.future.exception():
            return 0
        return sum(each == right for each in self.future.result())

    def wait(self) -> Sequence[T] | None:
        """The answers, one per key; ``None`` when there are none by the deadline. Call it once."""
        try:
            given = self.future.result(timeout=self._deadline_s)
            if len(given) != self.count:
                raise ValueError(f"{len(given)} answers to {self.count} keys")
        except CancelledError:
            return None
        except TimeoutError:
            self.refuse()  # if it has not begun
            self._failed("timeout", f"no answer in {self._deadline_s:.3g} s")
            return None
        except Exception as error:  # noqa: BLE001 - whatever a tier does wrong is a miss
            self._failed(type(error).__name__, str(error))
            return None
        self._health.succeeded(self._span)
        return given

    def _failed(self, error: str, why: str) -> None:
        self.error = error
        self._health.failed(self._verb, error, why, self._span)
