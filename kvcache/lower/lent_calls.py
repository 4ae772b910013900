"""Calls of lower tiers that read or fill the caller's memory.

Always true here: when an operation returned, no call of it reads or writes the caller's memory, not
even one that hangs and continues later.

* A call gets views of the memory that were made for it alone. They are released when the call has
  ended, or at its deadline: later uses of a released ``memoryview`` raise ``ValueError``, which is
  a failure of that late call.
* The tier must touch the memory by nothing but slice assignment of whole views, as ``Framed`` does
  (``Workspace.pack`` and ``Workspace.unpack``). An assignment is one step under Python's GIL, so a
  view is released before it or after it, never during it. A slice of a view, or
  ``numpy.frombuffer`` of it, is a view of its own: releasing does not reach it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Generic, TypeVar

from kvcache.lower.pending_call import PendingCall

T = TypeVar("T")

_RETRY_S = 0.001


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
    """The calls of one operation to one tier, several at a time. None begins after one failed.

    Args:
        buffers: the caller's memory for each block.
        positions: of the blocks, in ``buffers``.
        blocks_per_call: the most blocks of one call.
        calls_at_once: how many calls are queued or running at the same time.
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
        calls_at_once: int,
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
        self._calls_at_once = 1 if assumed else calls_at_once  # until the first call is answered
        self._calls_at_once_later = calls_at_once
        self._start = start
        self._assumed = assumed
        self._writable = writable
        self._lent: list[list[memoryview]] = []  # the views of every call
        self._in_flight: deque[tuple[PendingCall[T], Sequence[int], list[memoryview]]] = deque()
        self._stopped = False

    @property
    def oldest(self) -> PendingCall[T] | None:
        """The oldest call in flight."""
        return self._in_flight[0][0] if self._in_flight else None

    def start_calls(self) -> None:
        """Start as many calls as may be in flight."""
        while self.unasked and not self._stopped and len(self._in_flight) < self._calls_at_once:
            positions = self.unasked[: self._blocks_per_call]
            if self._writable:
                views = [memoryview(self._buffers[at]) for at in positions]
            else:
                views = [self._buffers[at].toreadonly() for at in positions]
            self._lent.append(views)  # before the call begins: an exception may interrupt this
            call = self._start(positions, views)
            self.unasked = self.unasked[self._blocks_per_call :]
            self.calls.append(call)
            self._in_flight.append((call, positions, views))

    def finish_calls(self) -> None:
        """Take the answers of the oldest calls that have ended or are past their deadline."""
        while self._in_flight:
            call, positions, views = self._in_flight[0]
            if not call.future.done() and call.remaining_s:
                return
            answers = call.wait(0.0)
            revoke(views)
            self._in_flight.popleft()
            self._calls_at_once = self._calls_at_once_later
            if answers is None:
                self._stopped = True
                continue
            self.answers.update(zip(positions, answers, strict=True))
            self._stopped |= self._assumed and not all(answers)

    def revoke_all(self) -> None:
        """Take the caller's memory away from every call."""
        for views in self._lent:
            revoke(views)


def run_series(series: Sequence[CallSeries[T]]) -> None:
    """Make the calls of all ``series`` at the same time, and take their answers.

    Each call ends at its deadline at the latest. No call uses the caller's memory after that, also
    if an exception interrupts the calling thread.
    """
    try:
        while waiting := list(_oldest_calls(series)):
            futures = [call.future for call in waiting]
            wait(futures, min(call.remaining_s for call in waiting), FIRST_COMPLETED)
            for each in series:
                each.finish_calls()
    finally:
        for each in series:
            each.revoke_all()


def _oldest_calls(series: Sequence[CallSeries[T]]) -> Iterator[PendingCall[T]]:
    """Start the calls of each series that may be in flight; yield its oldest one."""
    for each in series:
        each.start_calls()
        if (oldest := each.oldest) is not None:
            yield oldest
