"""Threads that call one lower tier: loads before stores, and a deadline for each answer.

Always true here:

* A thread takes the oldest queued load, and a store only when no load is queued.
* Every pending call is answered, cancelled or failed exactly once. At the deadline its caller gives
  up; the call itself goes on, because nothing can interrupt it.
* The outcome of every call is recorded in the tier's health once: by the thread that made the call,
  or at the deadline.
* A thread survives whatever its job raises. Threads are daemons: a call that hangs does not keep
  the process from exiting.
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
from kvcache.lower.circuit_breaker import TierHealth
from kvcache.process import bind_to_process

log = logging.getLogger(__name__)

T = TypeVar("T")

LOAD, STORE, STOP = 0, 1, 2
"""Priorities of jobs; threads take the lowest number first."""


def _do_nothing() -> None:
    pass


class WorkerPool:
    """Daemon threads with one priority queue of jobs.

    Args:
        name: part of the threads' names.
        threads: how many jobs run at once; with 0, every job is dropped.

    Raises:
        RuntimeError: when a thread cannot be started.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], None], Callable[[], object]]] = (
            PriorityQueue()
        )
        self._sequence = itertools.count()  # the order of jobs of one priority
        self._lock = threading.Lock()
        self._closed = not threads
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(
                    target=self._run_jobs, name=f"kvcache-{name}-{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close(0.0)  # end the threads that were started
            raise
        bind_to_process(self)

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The threads of the pool."""
        return tuple(self._threads)

    def add_job(
        self,
        priority: int,
        job: Callable[[], None],
        on_drop: Callable[[], object] = _do_nothing,
    ) -> None:
        """Queue ``job``. If it will never run, ``on_drop`` is called instead."""
        with self._lock:
            if not self._closed:
                self._jobs.put((priority, next(self._sequence), job, on_drop))
                return
        on_drop()

    def submit(self, call: Callable[..., T], *arguments: object) -> Future[T]:
        """Queue ``call(*arguments)``; its future is cancelled if the call will never run."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised by future.result()
                future.set_exception(error)
            else:
                future.set_result(result)

        def on_drop() -> None:
            future.cancel()
            future.set_running_or_notify_cancel()  # wakes threads in concurrent.futures.wait()

        self.add_job(LOAD, job, on_drop)
        return future

    def drop_queued(self) -> None:
        """Drop every job that no thread has taken."""
        queued = []
        with suppress(Empty):
            while True:
                queued.append(self._jobs.get_nowait())
        for priority, number, job, on_drop in queued:
            if priority == STOP:
                self._jobs.put((priority, number, job, on_drop))
            else:
                on_drop()

    def close(self, timeout_s: float) -> None:
        """Take no more jobs, and end the threads once the queue is empty. Idempotent.

        Waits ``timeout_s`` for the threads, but never for the calling thread itself. A thread that
        has not ended by then goes on until its job returns.
        """
        with self._lock:
            closed, self._closed = self._closed, True
            for _ in [] if closed else self._threads:
                self._jobs.put((STOP, next(self._sequence), _do_nothing, _do_nothing))
        deadline = time.monotonic() + timeout_s
        current = threading.current_thread()
        for thread in [each for each in self._threads if each is not current]:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run_jobs(self) -> None:
        while True:
            priority, _, job, on_drop = self._jobs.get()
            if priority == STOP:
                return
            try:
                job()
            except BaseException:
                log.exception("kvcache: worker pool: a job failed unexpectedly; its thread goes on")
            del job, on_drop  # releases the blocks they refer to before the next get() waits


class PendingCall(Generic[T]):
    """A call of a lower tier's method that is queued, running or done.

    Args:
        health: records the outcome.
        deadline_s: how long :meth:`wait` waits.
        operation: the tier's method.
        answer_count: how many answers the call returns, one per key.
        on_cancel: called if the call is cancelled before it begins.
        span: the current span of the thread that makes the call; gets the events of its outcome.
    """

    def __init__(
        self,
        health: TierHealth,
        deadline_s: float,
        operation: str,
        answer_count: int,
        on_cancel: Callable[[], None],
        span: Span,
    ) -> None:
        self._health = health
        self._deadline_s = deadline_s
        self._operation = operation
        self.answer_count = answer_count
        self._on_cancel = on_cancel
        self._span = span
        self._created = time.monotonic()
        self._begin_or_cancel = threading.Lock()  # acquired once, by run() or by cancel()
        self._outcome_recorded = threading.Lock()  # acquired once, by the first to record
        self.queued_s = 0.0  # from creation to the beginning of the call
        self.error = ""  # the kind of failure in one word
        self.future: Future[Sequence[T]] = Future()

    def cancel(self) -> None:
        """Cancel the call if it has not begun."""
        if self._begin_or_cancel.acquire(blocking=False):
            self.future.cancel()
            self.future.set_running_or_notify_cancel()  # wakes concurrent.futures.wait()
            self._on_cancel()

    def run(self, call: Callable[[], Sequence[T]]) -> None:
        """Make the call in this thread, unless it was cancelled."""
        if not self._begin_or_cancel.acquire(blocking=False):
            return
        begun = time.monotonic()
        self.queued_s = begun - self._created
        failure: TierError | None = None
        answers: Sequence[T] = ()
        try:
            with telemetry.use_span(self._span):
                answers = call()
        except TierError as error:
            failure = error.with_traceback(None)  # its frames refer to the blocks' memory
        except BaseException as error:  # noqa: BLE001 - the application's telemetry may raise
            failure = TierError(*describe_error(error))
        try:
            self._record_duration(time.monotonic() - begun, failure.error if failure else "")
            self._record_outcome(failure)
        finally:
            if failure:
                self.future.set_exception(failure)
            else:
                self.future.set_result(answers)

    def count_equal(self, expected: T) -> int:
        """Return how many answers equal ``expected``; 0 if there are no answers yet."""
        if not self.future.done() or self.future.cancelled() or self.future.exception():
            return 0
        return sum(answer == expected for answer in self.future.result())

    def wait(self) -> Sequence[T] | None:
        """Return the answers, one per key; ``None`` without any by the deadline. Call it once."""
        try:
            return self.future.result(timeout=self._deadline_s)
        except TimeoutError:
            self.cancel()
            self._record_outcome(TierError("timeout", f"no answer in {self._deadline_s:.3g} s"))
        except (CancelledError, TierError):
            pass  # cancelled, or recorded by the thread that made the call
        return None

    def _record_duration(self, seconds: float, error: str) -> None:
        late = self.queued_s + seconds > self._deadline_s
        error = error or ("timeout" if late else "")
        self._health.timer.record(self._operation, seconds, error)

    def _record_outcome(self, failure: TierError | None) -> None:
        if not self._outcome_recorded.acquire(blocking=False):
            return
        if failure is None:
            self._health.record_success(self._span)
        else:
            self.error = failure.error
            self._health.record_failure(self._operation, failure.error, failure.why, self._span)
