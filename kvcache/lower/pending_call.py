"""A call of a lower tier's method, with a deadline for its answer.

Invariants:

* Every pending call is answered, cancelled or failed exactly once. At the deadline its caller stops
  waiting; the call itself continues, because nothing can interrupt it.
* The outcome of every call is recorded in the tier's health at most once: by the thread that made
  the call, or at the deadline. A tier that is busy does not fail: a call that spent half of its
  deadline or more in the queue is no failure at the deadline if the tier has answered another call
  since.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

from opentelemetry.trace import Span

from kvcache import telemetry
from kvcache.guards.calls import TierError, describe_error
from kvcache.lower.circuit_breaker import TierHealth

T = TypeVar("T")


class PendingCall(Generic[T]):
    """A call of a lower tier's method that is queued, running or done.

    Args:
        health: records the outcome.
        deadline_s: how long :meth:`wait` waits.
        operation: the tier's method.
        answer_count: how many answers the call returns, one per key.
        on_cancel: called if the call is cancelled before it begins.
        span: the current span of the thread that makes the call; gets the events of its outcome.
        queue_counts: whether the time in the queue counts when a duration is recorded as late.
    """

    def __init__(
        self,
        health: TierHealth,
        deadline_s: float,
        operation: str,
        answer_count: int,
        on_cancel: Callable[[], None],
        span: Span,
        *,
        queue_counts: bool = True,
    ) -> None:
        self._queue_counts = queue_counts
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
        self.ended_at = 0.0  # by ``time.monotonic``; 0 if it has not ended
        self.error = ""  # the kind of failure in one word
        self.future: Future[Sequence[T]] = Future()

    def cancel(self) -> bool:
        """Cancel the call if it has not begun; return whether this did so."""
        if not self._begin_or_cancel.acquire(blocking=False):
            return False
        self.future.cancel()
        self.future.set_running_or_notify_cancel()  # wakes concurrent.futures.wait()
        self._on_cancel()
        return True

    def run(self, call: Callable[[], Sequence[T]]) -> None:
        """Make the call in this thread, unless it was cancelled."""
        if not self._begin_or_cancel.acquire(blocking=False):
            return
        begun = time.monotonic()
        self.queued_s = begun - self._created
        failure: TierError | None = None
        answers: Sequence[T] = ()
        try:
            if self._span.is_recording():
                with telemetry.use_span(self._span):
                    answers = call()
            else:
                answers = call()
        except TierError as error:
            failure = error.with_traceback(None)  # its frames refer to the blocks' memory
        except BaseException as error:  # noqa: BLE001 - the application's telemetry may raise
            failure = TierError(*describe_error(error))
        self.ended_at = time.monotonic()
        try:
            self._record_duration(self.ended_at - begun, failure.error if failure else "")
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

    def remaining_s(self, since: float = 0.0) -> float:
        """Return the seconds until the deadline, from the call's creation on, or from ``since``.

        ``since``, by ``time.monotonic``, counts if it is later. The result is 0 after the deadline.
        """
        return max(0.0, max(self._created, since) + self._deadline_s - time.monotonic())

    def wait(self, timeout_s: float | None = None) -> Sequence[T] | None:
        """Return the answers, one per key; ``None`` after the deadline or a failure. Call once.

        Args:
            timeout_s: how long to wait; ``None`` is the whole deadline from now on.
        """
        try:
            return self.future.result(self._deadline_s if timeout_s is None else timeout_s)
        except TimeoutError:
            if (self.cancel() or self._was_queued_long) and self._tier_answers:
                self.error = "busy"
                self._outcome_recorded.acquire(blocking=False)  # the late end says nothing either
            else:
                self._record_outcome(TierError("timeout", f"no answer in {self._deadline_s:.3g} s"))
        except (CancelledError, TierError):
            pass  # cancelled, or recorded by the thread that made the call
        return None

    @property
    def _was_queued_long(self) -> bool:
        return self.queued_s >= self._deadline_s / 2

    @property
    def _tier_answers(self) -> bool:
        """Whether the tier has answered another call since this one was created."""
        return self._health.succeeded_at > self._created

    def _record_duration(self, seconds: float, error: str) -> None:
        late = (self.queued_s if self._queue_counts else 0.0) + seconds > self._deadline_s
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
