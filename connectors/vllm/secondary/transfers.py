"""The jobs of vLLM's in one direction: each is cut into pieces, which threads transfer.

Invariants:

* A job is reported exactly once, after its last piece. From then on no thread and no tier touches
  the memory of its rows, so vLLM may use the rows for other blocks.
* A hanging tier does not hold up the jobs that wait: when a piece has ended at a tier's deadline
  without a block, they fail. A piece ends at the deadlines of the tiers at the latest.
* The rows that jobs of this direction pin are bounded, unless one job alone has more; a further job
  beyond the bound fails at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache.worker_pool import LOAD, WorkerPool


@dataclass(slots=True)
class RowTransfer:
    """A job: blocks to copy between the tiers and rows of vLLM's memory.

    Attributes:
        job_id: vLLM's number of the job.
        keys: vLLM's keys of the blocks, in the order of the rows.
        names: the keys of the tiers, in the same order.
        rows: the number of each row.
        parent: the name that ``names[0]`` continues; ``None`` if unknown.
        span: the job's span.
        begun_at: when vLLM submitted it, in seconds.
        seconds: from its beginning to the end of its last piece.
        succeeded: which blocks were transferred.
    """

    job_id: int
    keys: Sequence[Any]
    names: Sequence[bytes]
    rows: Sequence[int]
    parent: bytes | None = None
    span: Span = INVALID_SPAN
    begun_at: float = 0.0
    seconds: float = 0.0
    succeeded: list[bool] = field(default_factory=list)
    pieces_left: int = 0

    def split(self) -> tuple[list[Any], list[Any]]:
        """Return the keys of the blocks that were transferred, and of the others."""
        pairs = list(zip(self.keys, self.succeeded, strict=True))
        return [key for key, good in pairs if good], [key for key, good in pairs if not good]


Move = Callable[[RowTransfer, int, int, Sequence[memoryview]], Sequence[bool]]
"""Transfers the blocks from a position to another of a job.

It gets the memory of their rows, and returns which blocks were transferred. It blocks, and touches
the memory no more after it has returned.
"""


class TransferQueue:
    """The jobs of one direction that have not been reported.

    Args:
        name: part of the threads' names.
        threads: how many pieces are transferred at the same time.
        move: transfers a piece.
        view: the memory of a row, made for one call.
        piece_blocks: the most blocks of a piece.
        most_blocks: the most blocks of all jobs that have not ended.
        deadline_s: the shortest deadline of a tier.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int,
        move: Move,
        view: Callable[[int], memoryview],
        piece_blocks: int,
        most_blocks: int,
        deadline_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._move = move
        self._view = view
        self._piece_blocks = piece_blocks
        self._most_blocks = most_blocks
        self._deadline_s = deadline_s
        self._clock = clock
        self._changed = threading.Condition()
        self._unfinished = 0  # jobs
        self._blocks = 0  # of unfinished jobs
        self._finished: list[RowTransfer] = []
        self._pool = WorkerPool(name, threads)

    @property
    def pending(self) -> bool:
        """Whether there is a job that was not returned by :meth:`take_finished`."""
        return bool(self._unfinished or self._finished)

    def submit(self, transfer: RowTransfer) -> None:
        """Start a job; it fails at once if too many blocks are in transfer."""
        blocks = len(transfer.keys)
        transfer.begun_at = self._clock()
        transfer.succeeded = [False] * blocks
        begins = range(0, blocks, self._piece_blocks)
        with self._changed:
            if not blocks or (self._blocks and self._blocks + blocks > self._most_blocks):
                self._finished.append(transfer)
                return
            self._unfinished += 1
            self._blocks += blocks
            transfer.pieces_left = len(begins)
        for begin in begins:
            end = min(begin + self._piece_blocks, blocks)
            dropped = partial(self._end_piece, transfer, begin, [False] * (end - begin))
            self._pool.add_job(LOAD, partial(self._run_piece, transfer, begin, end), dropped)

    def take_finished(self) -> list[RowTransfer]:
        """Return the jobs that have ended since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
        return finished

    def drop_waiting(self) -> None:
        """Fail every piece that no thread has begun."""
        self._pool.drop_queued()

    def wait(self, timeout_s: float) -> bool:
        """Wait until every job has ended; return whether that happened in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Fail the pieces that wait, and end the threads; a late one ends with its call."""
        self._pool.drop_queued()
        self._pool.close(timeout_s)

    def _run_piece(self, transfer: RowTransfer, begin: int, end: int) -> None:
        succeeded: Sequence[bool] = [False] * (end - begin)
        views: list[memoryview] = []
        begun = self._clock()
        try:
            views = [self._view(row) for row in transfer.rows[begin:end]]
            succeeded = self._move(transfer, begin, end, views)
        finally:
            for view in views:
                with suppress(BufferError):  # it is in use, and released with its last user
                    view.release()
            del views
            self._end_piece(transfer, begin, succeeded)
        if not any(succeeded) and self._clock() - begun >= self._deadline_s:
            self.drop_waiting()

    def _end_piece(self, transfer: RowTransfer, begin: int, succeeded: Sequence[bool]) -> None:
        now = self._clock()
        with self._changed:
            transfer.succeeded[begin : begin + len(succeeded)] = succeeded
            transfer.pieces_left -= 1
            if not transfer.pieces_left:
                transfer.seconds = now - transfer.begun_at
                self._unfinished -= 1
                self._blocks -= len(transfer.keys)
                self._finished.append(transfer)
                self._changed.notify_all()
