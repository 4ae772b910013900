"""Calls of lower tiers that read or fill the caller's memory.

Invariant: when an operation returned, no call of it reads or writes the caller's memory, not
even one that hangs and continues later.

* A call gets views of the memory that were made for it alone. The operation releases them before it
  returns: later uses of a released ``memoryview`` raise ``ValueError``, which is a failure of that
  late call.
* The tier must touch the memory by nothing but slice assignment of whole views, as ``Framed`` does
  (``Workspace.pack`` and ``Workspace.unpack``). An assignment is one step under Python's GIL, so a
  view is released before it or after it, never during it. A slice of a view, or
  ``numpy.frombuffer`` of it, is a view of its own: releasing does not reach it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from contextlib import suppress
from typing import Generic, TypeVar

from kvcache.guards.calls import TierError
from kvcache.lower.pending_call import PendingCall

T = TypeVar("T")

_RETRY_S = 0.001
_ASSUMED_IN_FLIGHT = 2  # calls, where it is only assumed that the tier holds the blocks


def revoke(views: Sequence[memoryview]) -> None:
    """Release ``views``, so that every later use of one raises ``ValueError``.

    Waits while a view is in use.
    """
    for view in views:
        while True:
            try:
                view.release()
                break
            except BufferError:  # a buffer of it is exported: the use ends soon
                time.sleep(_RETRY_S)


class CallSeries(Generic[T]):
    """The calls of one operation to one tier, several in flight. None begins after one failed.

    A call is given up when neither it nor the call before it has ended for the tier's deadline.

    Args:
        buffers: the caller's memory for each block.
        positions: of the blocks, in ``buffers``.
        blocks_per_call: the most blocks of one call.
        most_in_flight: how many calls are queued or running at the same time.
        start: starts the call for some positions, with views of their buffers.
        writable: whether the tier may write to the memory.
        assumed: whether it is only assumed that the tier holds the blocks: the first call is made
            alone, and none begins after a block was missed.

    Attributes:
        calls: all calls that were started.
        answers: the answer for each position that has one.
        unasked: the positions for which no call was started.
    """

    def __init__(
        self,
        buffers: Sequence[memoryview],
        positions: Sequence[int],
        blocks_per_call: int,
        most_in_flight: int,
        start: Callable[[Sequence[int], Sequence[memoryview]], PendingCall[T]],
        *,
        writable: bool,
        assumed: bool = False,
    ) -> None:
        self.calls: list[PendingCall[T]] = []
        self.answers: dict[int, T] = {}
        self.unasked = positions
        self._buffers = buffers
        self._blocks_per_call = blocks_per_call
        self._most_in_flight = most_in_flight
        self._start = start
        self._assumed = assumed
        self._writable = writable
        self._lent: list[list[memoryview]] = []  # the views of every call
        self._in_flight: deque[tuple[PendingCall[T], Sequence[int]]] = deque()
        self._answered_at = 0.0  # when the last call that was taken had ended
        self._stopped = False

    @property
    def in_flight(self) -> bool:
        """Whether a call is queued or running."""
        return bool(self._in_flight)

    @property
    def awaited(self) -> PendingCall[T]:
        """The call to wait for: half of the calls in flight go on while others are started.

        If that call has ended before an older one, it is the oldest call, so that waiting lasts.
        """
        more = self.unasked and not self._stopped
        call, _ = self._in_flight[(len(self._in_flight) - 1) // 2 if more else -1]
        return self._in_flight[0][0] if call.future.done() else call

    @property
    def remaining_s(self) -> float:
        """Seconds until the oldest call in flight is given up."""
        return self._in_flight[0][0].remaining_s(self._answered_at)

    def start_calls(self) -> None:
        """Start as many calls as may be in flight."""
        most = self._most_in_flight
        if self._assumed:
            most = _ASSUMED_IN_FLIGHT if self.answers else 1
        while self.unasked and not self._stopped and len(self._in_flight) < most:
            positions = self.unasked[: self._blocks_per_call]
            if self._writable:
                views = [memoryview(self._buffers[at]) for at in positions]
            else:
                views = [self._buffers[at].toreadonly() for at in positions]
            self._lent.append(views)  # before the call begins: an exception may interrupt this
            call = self._start(positions, views)
            self.unasked = self.unasked[self._blocks_per_call :]
            self.calls.append(call)
            self._in_flight.append((call, positions))

    def finish_calls(self) -> None:
        """Take the answers of the oldest calls that have ended; give up if they are late."""
        while self._in_flight:
            call, positions = self._in_flight[0]
            if not call.future.done():
                if not self.remaining_s:
                    self._give_up()
                return
            self._in_flight.popleft()
            answers = call.wait(0.0)
            self._answered_at = call.ended_at
            self._take(positions, answers)

    def _take(self, positions: Sequence[int], answers: Sequence[T] | None) -> None:
        """Take the answers of a call; ``None`` if it failed."""
        self.answers.update(zip(positions, answers or (), strict=False))
        self._stopped |= answers is None or (self._assumed and not all(answers))

    def _give_up(self) -> None:
        """Wait no longer for the calls in flight: cancel those that have not begun."""
        for call, _ in list(self._in_flight)[1:]:
            call.cancel()
        for call, positions in self._in_flight:
            self._take(positions, call.wait(0.0))
        self._in_flight.clear()

    def end(self) -> None:
        """Take the caller's memory away from every call; cancel those that have not begun."""
        for call, _ in self._in_flight:
            call.cancel()
        for views in self._lent:
            revoke(views)


def run_series(series: Sequence[CallSeries[T]]) -> None:
    """Make the calls of all ``series`` at the same time, and take their answers.

    No call uses the caller's memory after that, also if an exception interrupts the calling thread.
    """
    try:
        while running := list(_start_calls(series)):
            _wait_for_one(running)
            for each in running:
                each.finish_calls()
    finally:
        try:
            _end_all(series)
        except BaseException:  # it may interrupt this, too
            _end_all(series)
            raise


def _end_all(series: Sequence[CallSeries[T]]) -> None:
    for each in series:
        each.end()


def _start_calls(series: Sequence[CallSeries[T]]) -> Iterator[CallSeries[T]]:
    """Start the calls that may be in flight; yield each series that has some."""
    for each in series:
        each.start_calls()
        if each.in_flight:
            yield each


def _wait_for_one(running: Sequence[CallSeries[T]]) -> None:
    """Wait until the awaited call of one series has ended, or one series is late."""
    futures = [each.awaited.future for each in running]
    timeout_s = min(each.remaining_s for each in running)
    if len(futures) == 1:  # a fraction of the cost of ``wait``
        with suppress(TimeoutError, CancelledError, TierError):
            futures[0].result(timeout_s)
    else:
        wait(futures, timeout_s, FIRST_COMPLETED)
