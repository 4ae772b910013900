"""The caller's memory: once a call of direct tiers has returned, no tier reads or writes it.

The engine reuses its memory at once, while a call of a tier that hangs continues later.
"""

from __future__ import annotations

import mmap
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pickle import PickleBuffer

import pytest
from opentelemetry.trace import INVALID_SPAN

from kvcache.keys import namespaced_key
from kvcache.lower.circuit_breaker import CircuitBreaker, TierHealth
from kvcache.lower.lent_calls import CallSeries, revoke, run_series
from kvcache.lower.pending_call import PendingCall
from kvcache.slab import PAGE
from kvcache.stats import TierName
from kvcache.testing import keys_of
from tests.support.direct_under_test import DirectUnderTest, size_of, stored
from tests.support.failing_parts import FaultyTier
from tests.support.stack_under_test import LONG, NAMESPACE, NEVER

SOON_S = 0.02
KEYS = keys_of("a", 4)


class HangingTier(FaultyTier):
    """Hangs once in one method."""

    def __init__(self) -> None:
        super().__init__()
        self._method = ""
        self._passing = 0

    def hang_in(self, method: str, passing: int = 0) -> None:
        """Hang in the next call of ``method``, after ``passing`` calls of it."""
        self.gate.clear()
        self._method, self._passing = method, passing

    def _begin_call(self, method: str) -> None:
        self.calls.append(method)
        if method != self._method:
            return
        self._passing -= 1
        if self._passing < 0:
            self._method = ""
            self.waiting.release()
            assert self.gate.wait(LONG)


@pytest.fixture
def tier() -> HangingTier:
    return HangingTier()


@pytest.fixture
def under_test(tier: HangingTier) -> Iterator[DirectUnderTest]:
    under_test = DirectUnderTest([tier], deadline_s=SOON_S, breaker_failures=NEVER)
    yield under_test
    under_test.close()


def call_until_it_hangs(
    tier: HangingTier, method: str, call: Callable[[], object], passing: int = 0
) -> None:
    """Call until the tier hangs in ``method``; on a busy machine a deadline can pass before."""
    while True:
        tier.hang_in(method, passing)
        call()
        if tier.waiting.acquire(blocking=False):
            return
        tier.gate.set()


def test_load_past_its_deadline_never_writes_to_the_memory(
    under_test: DirectUnderTest, tier: HangingTier
) -> None:
    tier.held.update(stored(KEYS))
    call_until_it_hangs(tier, "load", lambda: under_test.get(KEYS))
    under_test.check_memory()
    under_test.resume()
    under_test.check_memory()
    assert tier.read[-4:] == [namespaced_key(NAMESPACE, key) for key in KEYS]  # it did continue


def test_load_past_its_deadline_in_its_second_batch_never_writes_to_the_memory(
    tier: HangingTier,
) -> None:
    under_test = DirectUnderTest([tier], deadline_s=SOON_S, frames=1, breaker_failures=NEVER)
    tier.held.update(stored(KEYS))
    call_until_it_hangs(tier, "load", lambda: under_test.get(KEYS), passing=1)
    under_test.check_memory()
    under_test.close()


def test_store_past_its_deadline_stores_no_reused_byte(
    under_test: DirectUnderTest, tier: HangingTier
) -> None:
    """The tier hangs in its lookup, before the frames are packed."""
    call_until_it_hangs(tier, "contains", lambda: under_test.put(KEYS))
    under_test.resume()
    assert under_test.held() == set()


def test_store_past_its_deadline_packs_no_later_batch(tier: HangingTier) -> None:
    under_test = DirectUnderTest([tier], deadline_s=SOON_S, frames=1, breaker_failures=NEVER)
    call_until_it_hangs(tier, "store", lambda: under_test.put(KEYS))
    under_test.resume()
    right = stored(KEYS)
    assert {name: right[name] for name in tier.held} == tier.held
    assert under_test.held() == set(KEYS[:1])  # its frame was packed before the deadline
    stats = under_test.direct.stats().lower[0]
    assert stats.stored_blocks == 0
    assert under_test.put(KEYS) == [True] * 4
    assert under_test.get(KEYS) == [True] * 4
    under_test.close()


def test_memory_of_a_call_that_hangs_can_be_unmapped(
    under_test: DirectUnderTest, tier: HangingTier
) -> None:
    tier.held.update(stored(KEYS))
    maps = [mmap.mmap(-1, PAGE) for _ in KEYS]

    def load() -> None:
        into = [memoryview(each)[: size_of(key)] for key, each in zip(KEYS, maps, strict=True)]
        under_test.direct.load(KEYS, into)

    call_until_it_hangs(tier, "load", load)
    for each in maps:
        each.close()  # raises BufferError while anything refers to the memory


def test_memory_of_an_answered_call_is_revoked_from_a_tier_that_kept_it() -> None:
    kept: list[memoryview] = []

    class KeepingTier(FaultyTier):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            kept.extend(into)
            return super().load(keys, into)

        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            kept.extend(blocks)
            return super().store(keys, blocks, parent)

    under_test = DirectUnderTest()
    [direct] = under_test.direct.tiers
    direct.channel.tier = KeepingTier()  # without frames, which would keep the memory from it
    assert under_test.put(KEYS) == [True] * 4
    assert under_test.get(KEYS) == [True] * 4
    assert len(kept) == 8
    for view in kept:
        with pytest.raises(ValueError, match="released memoryview"):
            view[:1] = b"x"
    under_test.close()


def test_tier_cannot_write_to_the_memory_of_a_store() -> None:
    class WritingTier(FaultyTier):
        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            blocks[0][:] = bytes(len(blocks[0]))
            return [True] * len(keys)

    under_test = DirectUnderTest()
    under_test.direct.tiers[0].channel.tier = WritingTier()
    block = bytearray(b"k" * 100)
    assert under_test.direct.store(KEYS[:1], [block]) == [False]
    assert block == b"k" * 100
    under_test.close()


def test_revoke_waits_while_a_view_is_in_use() -> None:
    view = memoryview(bytearray(PAGE))
    in_use = PickleBuffer(view)  # exports a buffer of the view
    with pytest.raises(BufferError):
        view.release()
    revoked = threading.Event()

    def wait() -> None:
        revoke([view])
        revoked.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not revoked.wait(SOON_S)
    in_use.release()
    thread.join(LONG)
    assert revoked.is_set()


def test_series_with_a_hanging_call_waits_for_it_and_not_for_those_that_ended() -> None:
    """Otherwise the caller's thread would spin until the deadline."""
    health = TierHealth(TierName("t1", "test"), {}, CircuitBreaker(time.monotonic))
    calls = [
        PendingCall[bool](health, LONG, "load", 1, lambda: None, INVALID_SPAN) for _ in range(3)
    ]
    buffers = [memoryview(bytearray(1))] * 4
    series: CallSeries[bool] = CallSeries(
        buffers, range(4), 1, 3, lambda positions, _: calls[positions[0]], writable=True
    )
    series.start_calls()
    assert series.awaited is calls[1]  # the fourth block can be asked for when half have ended
    calls[1].run(lambda: [True])
    series.finish_calls()
    assert series.awaited is calls[0]
    calls[0].run(lambda: [True])
    series.finish_calls()
    assert series.answers == {0: True, 1: True}
    series.end()


def test_exception_in_the_calling_thread_revokes_the_memory(tier: HangingTier) -> None:
    """A signal handler raises while the caller waits."""
    under_test = DirectUnderTest([tier], blocks_per_call=1, calls=1, breaker_failures=NEVER)

    class InterruptedByTestError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise InterruptedByTestError

    def send_signal() -> None:
        assert tier.waiting.acquire(timeout=LONG)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    tier.held.update(stored(KEYS))
    tier.hang_in("load")
    buffers = [bytearray(size_of(key)) for key in KEYS]
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        sender = threading.Thread(target=send_signal)
        sender.start()
        with pytest.raises(InterruptedByTestError):
            under_test.direct.load(KEYS, buffers)
        sender.join(LONG)
    finally:
        signal.signal(signal.SIGUSR1, before)
    under_test.reuse(buffers)
    under_test.close()
    assert under_test.direct.stats().lower[0].errors == 1  # the calls that had not begun never do


def test_exception_while_the_memory_is_revoked_revokes_all_of_it() -> None:
    """A signal handler raises when the first of two tiers has lost its memory."""

    class InterruptedByTestError(Exception):
        pass

    class InterruptedSeries(CallSeries[bool]):
        interrupted = False

        def end(self) -> None:
            super().end()
            if not self.interrupted:
                self.interrupted = True
                raise InterruptedByTestError

    def start(_: Sequence[int], views: Sequence[memoryview]) -> PendingCall[bool]:
        lent.extend(views)
        call: PendingCall[bool] = PendingCall(health, LONG, "load", 1, lambda: None, INVALID_SPAN)
        call.cancel()
        return call

    lent: list[memoryview] = []
    health = TierHealth(TierName("t", "test"), {}, CircuitBreaker(lambda: 0.0))
    series = [
        kind([memoryview(bytearray(PAGE))], [0], 1, 1, start, writable=True)
        for kind in (InterruptedSeries, CallSeries[bool])
    ]
    with pytest.raises(InterruptedByTestError):
        run_series(series)
    assert len(lent) == 2
    for view in lent:
        with pytest.raises(ValueError, match="released memoryview"):
            view[:1] = b"x"


def test_many_threads_with_a_tier_that_hangs_at_random_get_right_bytes() -> None:
    class LateTier(FaultyTier):
        """Every fifth call lasts until the next one begins, mostly past its deadline."""

        def __init__(self) -> None:
            super().__init__()
            self.late = True
            self.previous = threading.Event()
            self._numbers = count()

        def _begin_call(self, method: str) -> None:
            self.previous.set()
            if next(self._numbers) % 5 == 4 and self.late:
                self.previous = this_call = threading.Event()
                this_call.wait(LONG)

    under_test = DirectUnderTest(
        [LateTier(), LateTier()],
        deadline_s=0.005,
        blocks_per_call=2,
        frames=1,
        calls=3,
        breaker_failures=NEVER,
    )
    chains = [keys_of(f"chain {number}", 5) for number in range(6)]

    def user(number: int) -> int:
        filled = 0
        for turn in range(30):
            keys = chains[(number + turn) % len(chains)]
            under_test.put(keys)
            filled += sum(under_test.get(keys))
        return filled

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(user, range(4))) > 0
    for tier in under_test.tiers:
        tier.late = False
        tier.previous.set()
    under_test.wait_idle()
    under_test.check_memory()
    for keys in chains:
        assert under_test.put(keys) == [True] * len(keys)
        assert under_test.get(keys) == [True] * len(keys)
    under_test.close()
