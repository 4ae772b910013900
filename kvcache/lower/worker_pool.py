"""Calls to one lower tier, made in threads of their own: loads first, and a wait with an end.

Always true here:

* A thread takes the first question that waits, a write only when none does.
* Every question is answered, refused or failed exactly once. Who waits is told by the deadline; the
  call itself goes on, since it cannot be ended from outside.
* Every call is reported to the tier's health once: by the thread that made it, or by the deadline.
* A thread outlives whatever it does, and the interpreter does not wait for it at exit: a call that
  hangs keeps no process alive.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from queue import Empty, PriorityQueue
from typing import Generic, TypeVar

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.guards.calls import TierError, describe_error
from kvcache.lower.circuit_breaker import Health
from kvcache.process import bind_to_process

log = logging.getLogger(__name__)

T = TypeVar("T")

LOAD, STORE, STOP = 0, 1, 2  # in the order in which they are taken


def _nothing() -> None:
    """Do nothing."""


class WorkerPool:
    """Daemon threads that make what calls are put to them.

    Args:
        name: of the threads.
        threads: calls under way at once; with none, every call is dropped.

    Raises:
        RuntimeError: when a thread cannot be started.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], None], Callable[[], object]]] = (
            PriorityQueue()
        )
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._closed = not threads
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(
                    target=self._work, name=f"kvcache-{name}-{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close(0.0)  # those that were started
            raise
        bind_to_process(self)

    def put(
        self, priority: int, job: Callable[[], None], drop: Callable[[], object] = _nothing
    ) -> None:
        """Have ``job`` done, after all that were put with a lower number before it is taken.

        ``drop`` is called in its place where the job will not be done.
        """
        with self._lock:
            if not self._closed:
                self._jobs.put((priority, next(self._order), job, drop))
                return
        drop()

    def submit(self, call: Callable[..., T], *arguments: object) -> Future[T]:
        """Have ``call(*arguments)`` made; the future is cancelled where it will not be made."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)

        def drop() -> None:
            future.cancel()
            future.set_running_or_notify_cancel()  # wakes a waiter for several futures

        self.put(LOAD, job, drop)
        return future

    def drop_waiting(self) -> None:
        """Drop every job that no thread has taken."""
        waiting = []
        with suppress(Empty):
            while True:
                waiting.append(self._jobs.get_nowait())
        for priority, order, job, drop in waiting:
            if priority == STOP:
                self._jobs.put((priority, order, job, drop))
            else:
                drop()

    def close(self, timeout_s: float) -> None:
        """Take no more jobs; have the threads end when none waits. Twice is allowed.

        Threads that have not ended after ``timeout_s`` are left, as is the caller's own thread.
        """
        with self._lock:
            closed, self._closed = self._closed, True
            for _ in [] if closed else self._threads:
                self._jobs.put((STOP, next(self._order), _nothing, _nothing))
        until = time.monotonic() + timeout_s
        current = threading.current_thread()
        for thread in [each for each in self._threads if each is not current]:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while True:
            priority, _, job, drop = self._jobs.get()
            if priority == STOP:
                return
            try:
                job()
            except BaseException:
                log.exception("kvcache: a call failed in a way that was not foreseen")
            del job, drop  # or what they hold is kept until the next call


class PendingCall(Generic[T]):
    """What a lower tier will say to one question.

    Args:
        health: of the tier, which is told how it went.
        deadline_s: what is waited for it.
        verb: for messages.
        count: how many answers there will be.
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
        self._decided = threading.Lock()  # taken to make the call, or to refuse it
        self._told = threading.Lock()  # taken to tell the health
        self.queued_s = 0.0  # until the call was made
        self.error = ""  # what went wrong, in a word
        self.future: Future[Sequence[T]] = Future()

    def refuse(self) -> None:
        """Nobody will be asked."""
        if self._decided.acquire(blocking=False):
            self.future.cancel()
            self.future.set_running_or_notify_cancel()  # wakes a waiter for several futures
            self._unasked()

    def run(self, call: Callable[[], Sequence[T]]) -> None:
        """Make the call, unless it was refused."""
        if not self._decided.acquire(blocking=False):
            return
        begun = time.monotonic()
        self.queued_s = begun - self._begun
        failure: TierError | None = None
        given: Sequence[T] = ()
        try:
            with telemetry.use_span(self._span):
                given = call()
        except TierError as error:
            failure = error.with_traceback(None)  # the frames hold the memory of the blocks
        except BaseException as error:  # noqa: BLE001 - the application's telemetry may raise
            failure = TierError(*describe_error(error))
        try:
            self._took(time.monotonic() - begun, failure.error if failure else "")
            self._tell(failure)
        finally:
            if failure:
                self.future.set_exception(failure)
            else:
                self.future.set_result(given)

    def _took(self, seconds: float, error: str) -> None:
        late = self.queued_s + seconds > self._deadline_s
        self._health.timer.record(self._verb, seconds, error or ("timeout" if late else ""))

    def came(self, right: T) -> int:
        """How many answers are ``right``; none if there is no telling yet."""
        if not self.future.done() or self.future.cancelled() or self.future.exception():
            return 0
        return sum(each == right for each in self.future.result())

    def wait(self) -> Sequence[T] | None:
        """The answers, one per key; ``None`` when there are none by the deadline. Call it once."""
        try:
            return self.future.result(timeout=self._deadline_s)
        except TimeoutError:
            self.refuse()  # if it has not begun
            self._tell(TierError("timeout", f"no answer in {self._deadline_s:.3g} s"))
        except (CancelledError, TierError):
            pass  # refused, or told by the thread that made the call
        return None

    def _tell(self, failure: TierError | None) -> None:
        """Tell the tier's health how the call went, unless that was done."""
        if not self._told.acquire(blocking=False):
            return
        if failure is None:
            self._health.succeeded(self._span)
        else:
            self.error = failure.error
            self._health.failed(self._verb, failure.error, failure.why, self._span)
