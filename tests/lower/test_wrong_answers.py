"""Whatever a lower tier raises or returns costs the answer of that call, and nothing else."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from opentelemetry.trace import INVALID_SPAN

from kvcache import Match, Tier, TierUsage
from kvcache.guards.calls import describe_error
from kvcache.secrets import MAX_CHARS
from kvcache.slab import PAGE
from kvcache.stats import LowerStats
from kvcache.testing import block_of, keys_of
from tests.support.failing_parts import FaultyTier
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest
from tests.support.wrong_results import (
    EXCEPTIONS,
    WRONG_BYTE_COUNTS,
    WRONG_RESULTS,
    UnreadableError,
)

METHODS = ("contains", "load", "store")
Fault = Callable[..., Any]


def faults_of(method: str) -> dict[str, Fault]:
    """Faulty replacements of a tier's method, by name."""

    def raising(make: Callable[[], BaseException]) -> Fault:
        def fault(*_: object) -> None:
            raise make()

        return fault

    def returning(make: Callable[[int], Any]) -> Fault:
        return lambda keys, *_: make(len(keys))

    found = {f"raises {name}": raising(make) for name, make in EXCEPTIONS.items()}
    returned = WRONG_RESULTS | (WRONG_BYTE_COUNTS if method == "load" else {})
    return found | {f"returns {name}": returning(make) for name, make in returned.items()}


CASES = [(method, name) for method in METHODS for name in faults_of(method)]


@pytest.fixture
def under_test() -> Iterator[StackUnderTest]:
    under_test = StackUnderTest()
    yield under_test
    under_test.stack.close()


def checked_stats(under_test: StackUnderTest) -> LowerStats:
    """The counters of the tier, after a check that they add up."""
    stats = under_test.stack.stats()
    [l1], [l2] = stats.tiers, stats.lower
    accounted = l2.stored_blocks + l2.known_blocks + l2.declined_blocks + l2.dropped_blocks
    assert accounted == l1.stored_blocks - l2.loaded_blocks
    return l2


@pytest.mark.parametrize(("method", "name"), CASES)
def test_faulty_call_costs_its_own_answer(
    under_test: StackUnderTest, method: str, name: str
) -> None:
    tier = under_test.tiers[0]
    kept, stored = keys_of("kept", 3), keys_of("stored", 2)
    under_test.put_in_tier(kept)
    threads = under_test.lower[0].channel.workers.threads
    working = getattr(tier, method)
    setattr(tier, method, faults_of(method)[name])
    for _ in range(2):  # one less than opens the breaker
        if method == "store":
            under_test.put(stored)
            assert under_test.stack.flush(LONG)
            assert under_test.stack.stats().lower[0].declined_blocks > 0
        elif method == "contains":
            assert under_test.stack.match(kept).result(LONG).blocks == 0
        else:
            with under_test.stack.fetch(Match(kept, 0, 3, (1, 1, 1))).result(LONG) as lease:
                assert len(lease) == 0
        under_test.check_invariants()
        checked_stats(under_test)
        under_test.front.clear()
    assert under_test.stack.stats().lower[0].errors == 2
    setattr(tier, method, working)
    assert under_test.fetch_count(kept) == 3
    under_test.put(stored)
    assert under_test.stack.flush(LONG)
    assert NAMESPACE + stored[0] in tier.held
    under_test.check_invariants()
    checked_stats(under_test)
    assert all(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EXCEPTIONS)
def test_breaker_opened_by_an_exception_closes_again(method: str, name: str) -> None:
    clock = ManualClock()
    under_test = StackUnderTest(clock=clock)
    tier, kept = under_test.tiers[0], keys_of("kept", 2)
    under_test.put_in_tier(kept)
    working = getattr(tier, method)
    setattr(tier, method, faults_of(method)[f"raises {name}"])
    match = Match(kept, 0, 2, (1, 1))
    for at in range(4):  # three failures open the breaker; the fourth is a probe
        clock.advance(10.0)
        if method == "store":
            under_test.put(keys_of(f"stored {at}", 1))
            assert under_test.stack.flush(LONG)
        elif method == "contains":
            under_test.stack.match(kept).result(LONG)
        else:
            under_test.stack.fetch(match).result(LONG).end()
    assert under_test.stack.stats().lower[0].breaker_open
    assert under_test.stack.stats().lower[0].errors == 4
    setattr(tier, method, working)
    clock.advance(10.0)
    assert under_test.fetch_count(kept) == 2
    assert not under_test.stack.stats().lower[0].breaker_open
    under_test.check_invariants()
    under_test.stack.close()


def test_answers_of_any_iterable_type_are_accepted() -> None:
    types: list[Callable[[list[Any]], Any]] = [
        tuple,
        iter,
        lambda held: dict(enumerate(held)).values(),
    ]
    with suppress(ImportError):
        types.append(__import__("numpy").array)

    class ConvertingTier(FaultyTier):
        convert: Callable[[list[Any]], Any]

        def contains(self, keys: Sequence[bytes]) -> list[bool]:
            return type(self).convert(super().contains(keys))  # type: ignore[no-any-return]

        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            return type(self).convert(super().load(keys, into))  # type: ignore[no-any-return]

        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            answers = super().store(keys, blocks, parent)
            return type(self).convert(answers)  # type: ignore[no-any-return]

    keys = keys_of("a", 4)
    under_test = StackUnderTest(tiers=[ConvertingTier()])
    under_test.put_in_tier(keys[:3])
    for convert in types:
        ConvertingTier.convert = staticmethod(convert)
        under_test.front.clear()
        assert under_test.fetch_count(keys) == 3
    assert under_test.stack.stats().lower[0].errors == 0
    under_test.check_invariants()
    under_test.stack.close()


def test_tier_that_changes_its_arguments_costs_its_own_answer() -> None:
    class MutatingTier(FaultyTier):
        def contains(self, keys: Sequence[bytes]) -> list[bool]:
            held = [True] * len(keys)
            keys.clear()  # type: ignore[attr-defined]
            return held

        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            for view in into:
                view.release()
            into.clear()  # type: ignore[attr-defined]
            keys.clear()  # type: ignore[attr-defined]
            return [0, 0]

        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            taken = [True] * len(keys)
            for view in blocks:
                view.release()
            keys.clear()  # type: ignore[attr-defined]
            blocks.clear()  # type: ignore[attr-defined]
            return taken

    under_test = StackUnderTest(tiers=[MutatingTier()])
    keys = keys_of("a", 2)
    assert under_test.fetch_count(keys) == 0
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    with under_test.stack.fetch_local(keys) as lease:
        assert [bytes(view) for view in lease.views] == [block_of(key, PAGE) for key in keys]
    under_test.check_invariants()
    assert under_test.stack.stats().lower[0].known_blocks == 2
    under_test.stack.close()


def test_kept_exception_has_no_reference_to_the_blocks_memory(
    under_test: StackUnderTest,
) -> None:
    tier, keys = under_test.tiers[0], keys_of("a", 1)
    tier.load = faults_of("load")["raises panic"]  # type: ignore[method-assign]
    with under_test.front.reserve(keys) as lease:
        call = under_test.lower[0].load(lease, INVALID_SPAN)
        assert call.wait() is None
        error = call.future.exception()
        while error is not None:
            trace = error.__traceback__
            while trace is not None:
                assert "into" not in trace.tb_frame.f_locals
                trace = trace.tb_next
            error = error.__context__
        assert lease.has_ended


def test_error_text_is_short_and_printable() -> None:
    name, text = describe_error(OSError("\x1b]0;owned\x07" * 1000 + "\n"))
    assert name == "OSError"
    assert text.isprintable()
    assert len(text) <= MAX_CHARS
    assert describe_error(UnreadableError())[1].isprintable()


def test_close_that_raises_leaves_the_other_tiers_closed(caplog: pytest.LogCaptureFixture) -> None:
    under_test = StackUnderTest(tiers=3)
    under_test.tiers[1].close = faults_of("close")["raises SystemExit"]  # type: ignore[method-assign]
    under_test.stack.close()
    assert [tier.closed for tier in under_test.tiers] == [True, False, True]
    assert "tier l3: close failed (SystemExit" in caplog.text


def test_close_in_a_callback_of_a_future_closes_every_tier() -> None:
    under_test, closed = StackUnderTest(), threading.Event()
    tier = under_test.tiers[0]

    def close(_: object) -> None:
        under_test.stack.close()
        closed.set()

    tier.gate.clear()
    match = under_test.stack.match(keys_of("a", 2))
    assert tier.waiting.acquire(timeout=LONG)
    match.add_done_callback(close)  # called by a thread of the stack
    tier.gate.set()
    assert closed.wait(LONG)
    assert tier.closed
    with pytest.raises(ValueError, match="released"):
        under_test.front.slab.view(0)


@pytest.mark.parametrize("name", [*EXCEPTIONS, *WRONG_RESULTS])
def test_faulty_usage_is_unknown(under_test: StackUnderTest, name: str) -> None:
    fault = faults_of("usage").get(f"raises {name}") or (lambda: WRONG_RESULTS[name](1))
    under_test.tiers[0].usage = fault  # type: ignore[method-assign]
    usage = under_test.stack.stats().lower[0].usage
    assert usage == Tier.usage(under_test.tiers[0])


def test_hanging_usage_is_the_last_answer(under_test: StackUnderTest) -> None:
    tier, keys = under_test.tiers[0], keys_of("a", 2)
    tier.usage = lambda: TierUsage(7)  # type: ignore[method-assign]
    assert under_test.stack.stats().lower[0].usage == TierUsage(7)
    released, called = threading.Event(), threading.Semaphore(0)

    def hang() -> TierUsage:
        called.release()
        released.wait()
        return TierUsage(8)

    tier.usage = hang  # type: ignore[method-assign]
    for _ in range(3):
        assert under_test.stack.stats().lower[0].usage == TierUsage(7)
    assert called.acquire(timeout=LONG)
    assert not called.acquire(blocking=False)  # not called again while it hangs
    under_test.put(keys)
    assert under_test.stack.flush(LONG)
    under_test.front.clear()
    assert under_test.fetch_count(keys) == 2
    released.set()
    under_test.stack.close()
    assert under_test.stack.stats().lower[0].usage == TierUsage(8)


def test_signal_handler_that_raises_during_usage_is_not_swallowed(
    under_test: StackUnderTest,
) -> None:
    def exit_process(*_: object) -> None:
        raise SystemExit

    def interrupted() -> TierUsage:
        os.kill(os.getpid(), signal.SIGTERM)
        return TierUsage()

    under_test.tiers[0].usage = interrupted  # type: ignore[method-assign]
    before = signal.signal(signal.SIGTERM, exit_process)
    try:
        with pytest.raises(SystemExit):
            under_test.stack.stats()
        del under_test.tiers[0].usage
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", [*EXCEPTIONS, *WRONG_RESULTS])
def test_faulty_resolve_costs_the_calls_until_it_works(name: str) -> None:
    def fault(*_: object) -> Any:
        if name in WRONG_RESULTS:
            return WRONG_RESULTS[name](1)
        error = EXCEPTIONS[name]()
        raise error

    under_test = StackUnderTest()
    kept = keys_of("kept", 2)
    under_test.put_in_tier(kept)
    under_test.tiers[0].resolve = fault  # type: ignore[assignment,method-assign]
    assert under_test.fetch_count(kept) == 0
    under_test.put(keys_of("stored", 1))
    assert under_test.stack.flush(LONG)
    assert checked_stats(under_test).errors == 2
    del under_test.tiers[0].resolve
    assert under_test.fetch_count(kept) == 2
    under_test.check_invariants()
    under_test.stack.close()


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_faulty_forget_still_resets_this_stack(name: str) -> None:
    def fault(*_: object) -> None:
        error = EXCEPTIONS[name]()
        raise error

    under_test = StackUnderTest()
    under_test.tiers[0].forget = fault  # type: ignore[assignment,method-assign]
    under_test.put(keys_of("a", 2))
    assert under_test.stack.flush(LONG)
    under_test.stack.clear()
    assert under_test.fetch_count(keys_of("a", 2)) == 0
    under_test.check_invariants()
    under_test.stack.close()


def test_write_that_hangs_as_the_probe_lets_a_later_call_probe() -> None:
    clock = ManualClock()
    under_test = StackUnderTest(blocks_per_call=1, calls=2, clock=clock)
    tier, keys = under_test.tiers[0], keys_of("a", 2)
    under_test.put_in_tier(keys)
    tier.fault = "raise"
    for _ in range(3):
        assert under_test.fetch_count(keys) == 0
    tier.fault = ""
    clock.now = 1.0
    tier.gate.clear()
    under_test.put(keys_of("stored", 1))  # the probe
    assert tier.waiting.acquire(timeout=LONG)
    store_gate, tier.gate = tier.gate, threading.Event()
    tier.gate.set()
    assert under_test.fetch_count(keys) == 0
    clock.now = 61.0
    assert under_test.fetch_count(keys) == 2
    store_gate.set()
    assert under_test.stack.flush(LONG)
    under_test.check_invariants()
    under_test.stack.close()
