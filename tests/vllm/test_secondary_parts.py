"""The parts of a secondary tier: lookups, transfers, announced blocks, compute times."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("kvcache.connectors.vllm.secondary", exc_type=ImportError)  # from vLLM 0.32 on

from kvcache.connectors.vllm.secondary.compute_times import ComputeTimes
from kvcache.connectors.vllm.secondary.events import AnnouncedBlocks
from kvcache.connectors.vllm.secondary.lookups import TierLookups
from kvcache.connectors.vllm.secondary.transfers import RowTransfer, TransferQueue
from tests.support.manual_clock import ManualClock
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

ONE, TWO = b"one", b"two"


class Asked:
    """Answers lookups: keys of ``held`` are held; calls wait for ``gate``."""

    def __init__(self, *held: bytes) -> None:
        self.held = held
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[list[bytes], str]] = []

    def __call__(self, keys: Sequence[bytes], request_id: str) -> list[bool]:
        self.calls.append((list(keys), request_id))
        self.gate.wait()
        return [key in self.held for key in keys]


def test_lookups_ask_once_for_each_key_of_a_step() -> None:
    asked = Asked(ONE)
    lookups = TierLookups(asked, 1.0, ManualClock())
    assert [lookups.ask(key, "a") for key in (ONE, TWO, ONE)] == [None] * 3
    assert lookups.ask(ONE, "b") is None
    lookups.flush()
    eventually(lambda: lookups.ask(TWO, "a") is not None, "the answer")
    assert [lookups.ask(ONE, "a"), lookups.ask(TWO, "a"), lookups.ask(ONE, "b")] == [
        True, False, True
    ]  # fmt: skip
    assert asked.calls == [([ONE, TWO], "a")]
    lookups.close(1.0)


def test_lookups_are_misses_after_the_deadline_and_ignore_the_late_answer() -> None:
    asked, clock = Asked(ONE), ManualClock()
    asked.gate.clear()
    lookups = TierLookups(asked, 1.0, clock)
    lookups.ask(ONE, "a")
    lookups.flush()
    eventually(lambda: asked.calls, "a thread asks")
    clock.advance(1.0)
    assert lookups.ask(ONE, "a") is None
    clock.advance(0.1)
    assert lookups.ask(ONE, "a") is False
    asked.gate.set()
    lookups.close(5.0)
    assert lookups.ask(ONE, "a") is False


def test_lookups_that_waited_for_the_deadline_are_not_asked() -> None:
    asked, clock = Asked(), ManualClock()
    asked.gate.clear()
    lookups = TierLookups(asked, 1.0, clock)
    requests = [f"r{number}" for number in range(20)]
    for request in requests:
        lookups.ask(request.encode(), request)
    lookups.flush()
    eventually(lambda: len(asked.calls) == 4, "four threads ask")
    clock.advance(2.0)
    assert [lookups.ask(request.encode(), request) for request in requests] == [False] * 20
    asked.gate.set()
    lookups.ask(ONE, "last")
    lookups.flush()
    eventually(lambda: lookups.ask(ONE, "last") is not None, "the last answer")
    assert len(asked.calls) == 5
    lookups.close(1.0)


def test_lookups_of_requests_that_were_aborted_while_they_waited_are_not_asked() -> None:
    asked = Asked(ONE)
    asked.gate.clear()
    lookups = TierLookups(asked, 1.0, ManualClock())
    requests = [f"r{number}" for number in range(20)]
    for request in requests:
        lookups.ask(request.encode(), request)
    lookups.flush()
    eventually(lambda: len(asked.calls) == 4, "four threads ask")
    for request in requests:
        lookups.forget(request)
    lookups.ask(ONE, "last")
    lookups.flush()
    asked.gate.set()
    eventually(lambda: lookups.ask(ONE, "last") is not None, "the last answer")
    assert lookups.ask(ONE, "last") is True
    assert len(asked.calls) == 5
    lookups.close(1.0)


def test_lookups_of_ended_requests_are_forgotten() -> None:
    asked = Asked(ONE)
    lookups = TierLookups(asked, 1.0, ManualClock())
    lookups.ask(ONE, "a")
    lookups.ask(ONE, "b")
    lookups.ask(TWO, "a")
    lookups.forget("a")
    assert len(lookups) == 1
    lookups.flush()  # asks for the key that another request wants, and not for the other one
    eventually(lambda: lookups.ask(ONE, "b") is True, "the answer")
    assert asked.calls == [([ONE], "a")]
    lookups.forget("b")
    assert len(lookups) == 0
    lookups.close(1.0)


def test_lookups_marked_keys_keep_the_new_answer() -> None:
    lookups = TierLookups(Asked(ONE), 1.0, ManualClock())
    lookups.ask(ONE, "a")
    lookups.mark([ONE, TWO], held=False)  # there is no answer yet
    lookups.flush()
    eventually(lambda: lookups.ask(ONE, "a") is not None, "the answer")
    assert lookups.ask(ONE, "a") is True
    lookups.mark([ONE], held=False)
    assert lookups.ask(ONE, "a") is False
    lookups.mark([ONE], held=True)
    assert lookups.ask(ONE, "a") is True
    lookups.mark_all_missed()
    assert lookups.ask(ONE, "a") is False
    lookups.close(1.0)


class Mover:
    """Transfers pieces: blocks with a number in ``bad`` fail; pieces wait for ``gate``."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad
        self.gate = threading.Event()
        self.gate.set()
        self.pieces: list[tuple[int, int, int]] = []
        self.views: list[memoryview] = []
        self.clock = ManualClock()
        self.takes_s = 0.0

    def __call__(
        self, job: RowTransfer, begin: int, end: int, views: Sequence[memoryview]
    ) -> list[bool]:
        self.pieces.append((job.job_id, begin, end))
        self.views += views
        self.gate.wait()
        self.clock.advance(self.takes_s)
        return [number not in self.bad for number in range(begin, end)]


def queue_of(mover: Mover, *, most_blocks: int = 100, threads: int = 1) -> TransferQueue:
    memory = memoryview(bytearray(1000))
    return TransferQueue(
        "test",
        threads=threads,
        move=mover,
        view=lambda row: memory[row : row + 1],
        piece_blocks=3,
        most_blocks=most_blocks,
        deadline_s=1.0,
        clock=mover.clock,
    )


def job(number: int, blocks: int) -> RowTransfer:
    keys = [f"{number}/{block}".encode() for block in range(blocks)]
    return RowTransfer(number, keys, keys, list(range(blocks)))


def test_transfer_is_reported_once_with_the_blocks_of_all_pieces() -> None:
    mover = Mover(1, 4)
    transfers = queue_of(mover)
    transfers.submit(job(7, 8))
    assert transfers.wait(5.0)
    assert transfers.pending
    [finished] = transfers.take_finished()
    assert finished.job_id == 7
    assert finished.succeeded == [number not in (1, 4) for number in range(8)]
    assert mover.pieces == [(7, 0, 3), (7, 3, 6), (7, 6, 8)]
    assert transfers.take_finished() == []
    assert not transfers.pending
    for view in mover.views:
        with pytest.raises(ValueError, match="released"):
            view.tobytes()
    transfers.close(1.0)


def test_transfer_without_blocks_ends_at_once() -> None:
    transfers = queue_of(Mover())
    transfers.submit(job(1, 0))
    assert [each.job_id for each in transfers.take_finished()] == [1]
    transfers.close(1.0)


def test_transfer_beyond_the_bound_fails_and_later_ones_do_not() -> None:
    mover = Mover()
    mover.gate.clear()
    transfers = queue_of(mover, most_blocks=10)
    transfers.submit(job(1, 12))  # one job alone may be larger
    transfers.submit(job(2, 1))
    [refused] = transfers.take_finished()
    assert (refused.job_id, refused.succeeded) == (2, [False])
    mover.gate.set()
    assert transfers.wait(5.0)
    transfers.submit(job(3, 5))
    transfers.submit(job(4, 5))
    assert transfers.wait(5.0)
    finished = {each.job_id: all(each.succeeded) for each in transfers.take_finished()}
    assert finished == {1: True, 3: True, 4: True}
    transfers.close(1.0)


@pytest.mark.parametrize(
    ("takes_s", "bad", "moved"), [(1.0, range(3), 1), (1.0, (0,), 4), (0.9, range(3), 4)]
)
def test_transfers_that_wait_behind_a_hanging_piece_fail(
    takes_s: float, bad: Any, moved: int
) -> None:
    """A piece that took a deadline and moved nothing has hung; a slow one or a failure has not."""
    mover = Mover(*bad)
    mover.takes_s = takes_s
    mover.gate.clear()
    transfers = queue_of(mover)
    transfers.submit(job(1, 6))
    transfers.submit(job(2, 6))
    mover.gate.set()
    assert transfers.wait(5.0)
    assert len(mover.pieces) == moved
    assert sorted(each.job_id for each in transfers.take_finished()) == [1, 2]
    transfers.close(1.0)


def test_transfer_of_a_failing_move_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> list[bool]:
        raise MemoryError

    mover = Mover()
    transfers = TransferQueue(
        "test",
        threads=1,
        move=fail,
        view=lambda row: memoryview(bytearray(1)),
        piece_blocks=3,
        most_blocks=9,
        deadline_s=1.0,
        clock=mover.clock,
    )
    transfers.submit(job(1, 2))
    assert transfers.wait(5.0)
    assert [each.succeeded for each in transfers.take_finished()] == [[False, False]]
    transfers.close(5.0)  # the thread logs after it has ended the job
    assert "a job failed" in caplog.text


def test_transfers_waiting_at_close_are_reported_as_failed() -> None:
    mover = Mover()
    mover.gate.clear()
    transfers = queue_of(mover)
    transfers.submit(job(1, 9))
    eventually(lambda: mover.pieces, "the first piece")
    transfers.drop_waiting()
    assert not transfers.wait(0.0)
    mover.gate.set()
    assert transfers.wait(5.0)
    [finished] = transfers.take_finished()
    assert finished.succeeded == [True] * 3 + [False] * 6
    transfers.close(1.0)


def test_announced_blocks_are_bounded_and_retracted_once() -> None:
    from vllm.v1.kv_offload.base import Locality, Medium

    blocks = AnnouncedBlocks(Medium.STORAGE, Locality.REMOTE, most=2)
    blocks.stored([ONE, TWO])
    blocks.stored([TWO, b"three"])  # forgets ONE
    blocks.gone([ONE, TWO])
    blocks.gone([TWO])
    blocks.cleared()
    events = [(event.keys, event.removed) for event in blocks.take()]
    assert events == [
        ([ONE, TWO], False),
        ([b"three"], False),
        ([TWO], True),
        ([b"three"], True),
    ]
    assert blocks.take() == []


def test_compute_time_is_that_of_the_first_stored_blocks() -> None:
    clock = ManualClock()
    observed: list[tuple[int, float]] = []
    times = ComputeTimes(lambda blocks, seconds: observed.append((blocks, seconds)), clock)
    times.scheduled(["a", "b", "c"])
    clock.advance(2.0)
    times.stored("a", 8)
    clock.advance(1.0)
    times.stored("a", 8)  # when its step began is unknown
    times.stored("b", 3)
    times.stored("unknown", 3)
    times.forget("c")
    times.stored("c", 3)
    assert observed == [(8, 2.0), (3, 3.0)]
    assert len(times) == 0
