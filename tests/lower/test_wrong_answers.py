"""Whatever a tier raises or returns costs the answer of that call, and nothing else."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from kvcache import Match, Tier, TierUsage
from kvcache.guards.calls import describe_error
from kvcache.secrets import MAX_CHARS
from kvcache.slab import PAGE
from kvcache.stats import LowerStats
from kvcache.testing import block_of, keys_of
from tests.support.failing_parts import Faulty
from tests.support.odd_answers import COUNTED, RAISED, RETURNED, UnreadableError
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest

VERBS = ("contains", "load", "store")
Wrong = Callable[..., Any]


def wrongs(verb: str) -> dict[str, Wrong]:
    """What a method may do wrong: functions that take its arguments."""

    def raising(make: Callable[[], BaseException]) -> Wrong:
        def wrong(*_: object) -> None:
            raise make()

        return wrong

    def returning(make: Callable[[int], Any]) -> Wrong:
        return lambda keys, *_: make(len(keys))

    found = {f"raises {name}": raising(make) for name, make in RAISED.items()}
    returned = RETURNED | (COUNTED if verb == "load" else {})
    return found | {f"returns {name}": returning(make) for name, make in returned.items()}


CASES = [(verb, name) for verb in VERBS for name in wrongs(verb)]


@pytest.fixture
def below() -> Iterator[StackUnderTest]:
    below = StackUnderTest()
    yield below
    below.stack.close()


def threads_of(below: StackUnderTest) -> list[threading.Thread]:
    return [thread for lower in below.lower for thread in lower.channel.workers.threads]


def adds_up(below: StackUnderTest) -> LowerStats:
    """The counts of the tier, once they were seen to add up."""
    stats = below.stack.stats()
    down = stats.lower[0]
    ways = down.stored_blocks + down.known_blocks + down.declined_blocks + down.dropped_blocks
    assert ways == stats.tiers[0].stored_blocks - down.loaded_blocks
    return down


@pytest.mark.parametrize(("verb", "name"), CASES)
def test_a_call_that_goes_wrong_costs_its_own_answer(
    below: StackUnderTest, verb: str, name: str
) -> None:
    tier = below.tiers[0]
    kept, stored = keys_of("kept", 3), keys_of("stored", 2)
    below.put_in_tier(kept)
    threads = threads_of(below)
    right = getattr(tier, verb)
    setattr(tier, verb, wrongs(verb)[name])
    for _ in range(2):  # one less than opens the breaker
        if verb == "store":
            below.put(stored)
            assert below.stack.flush(LONG)
            assert below.stack.stats().lower[0].declined_blocks > 0
        elif verb == "contains":
            assert below.stack.match(kept).result(LONG).blocks == 0
        else:
            with below.stack.fetch(Match(kept, 0, 3, (1, 1, 1))).result(LONG) as lease:
                assert len(lease) == 0
        below.check_invariants()
        adds_up(below)
        below.front.clear()
    assert below.stack.stats().lower[0].errors == 2
    setattr(tier, verb, right)
    assert below.fetch_count(kept) == 3
    below.put(stored)
    assert below.stack.flush(LONG)
    assert NAMESPACE + stored[0] in tier.held
    below.check_invariants()
    adds_up(below)
    assert all(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", RAISED)
def test_a_breaker_that_an_exception_opened_closes_again(verb: str, name: str) -> None:
    now = [0.0]
    below = StackUnderTest(clock=lambda: now[0])
    tier, kept = below.tiers[0], keys_of("kept", 2)
    below.put_in_tier(kept)
    right = getattr(tier, verb)
    setattr(tier, verb, wrongs(verb)[f"raises {name}"])
    match = Match(kept, 0, 2, (1, 1))
    for at in range(4):  # three open it, the fourth is the probe
        now[0] += 10.0
        if verb == "store":
            below.put(keys_of(f"stored {at}", 1))
            assert below.stack.flush(LONG)
        elif verb == "contains":
            below.stack.match(kept).result(LONG)
        else:
            below.stack.fetch(match).result(LONG).end()
    assert below.stack.stats().lower[0].breaker_open
    assert below.stack.stats().lower[0].errors == 4
    setattr(tier, verb, right)
    now[0] += 10.0
    assert below.fetch_count(kept) == 2
    assert not below.stack.stats().lower[0].breaker_open
    below.check_invariants()
    below.stack.close()


def answer_as(kind: Callable[[list[Any]], Any], right: list[Any], _: str) -> Any:
    return kind(right)


def test_answers_of_any_sequence_type_are_taken(below: StackUnderTest) -> None:
    keys = keys_of("a", 4)
    below.put_in_tier(keys[:3])
    kinds: list[Callable[[list[Any]], Any]] = [
        tuple,
        iter,
        lambda held: dict(enumerate(held)).values(),
    ]
    with suppress(ImportError):
        kinds.append(__import__("numpy").array)
    for kind in kinds:
        tier = Faulty()
        tier.held = below.tiers[0].held
        tier._answer = partial(answer_as, kind)  # type: ignore[method-assign]
        below.lower[0].channel.tier = tier
        below.front.clear()
        assert below.fetch_count(keys) == 3
    below.check_invariants()


def test_a_tier_that_changes_what_it_is_given_costs_its_own_answer(below: StackUnderTest) -> None:
    class Greedy(Faulty):
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

    below.lower[0].channel.tier = Greedy()
    keys = keys_of("a", 2)
    assert below.fetch_count(keys) == 0
    below.put(keys)
    assert below.stack.flush(LONG)
    with below.stack.fetch_local(keys) as lease:
        assert [bytes(view) for view in lease.views] == [block_of(key, PAGE) for key in keys]
    below.check_invariants()
    assert below.stack.stats().lower[0].known_blocks == 2


def test_an_exception_is_not_kept_with_the_memory_that_its_traceback_holds(
    below: StackUnderTest,
) -> None:
    tier, keys = below.tiers[0], keys_of("a", 1)
    tier.load = wrongs("load")["raises panic"]  # type: ignore[method-assign]
    with below.front.reserve(keys) as lease:
        answer = below.lower[0].load(lease, below.stack.front.pin(()).span)
        assert answer.wait() is None
        error = answer.future.exception()
        while error is not None:
            trace = error.__traceback__
            while trace is not None:
                assert "into" not in trace.tb_frame.f_locals
                trace = trace.tb_next
            error = error.__context__
        assert lease.has_ended


def test_the_text_of_an_exception_is_short_and_printable() -> None:
    name, text = describe_error(OSError("\x1b]0;owned\x07" * 1000 + "\n"))
    assert name == "OSError"
    assert text.isprintable()
    assert len(text) <= MAX_CHARS
    assert describe_error(UnreadableError())[1].isprintable()


def test_a_close_that_raises_leaves_the_rest_closed(caplog: pytest.LogCaptureFixture) -> None:
    below = StackUnderTest(tiers=3)
    below.tiers[1].close = wrongs("close")["raises SystemExit"]  # type: ignore[method-assign]
    below.stack.close()
    assert [tier.closed for tier in below.tiers] == [True, False, True]
    assert "tier l3: close failed (SystemExit" in caplog.text


def test_close_in_the_callback_of_a_future_closes_every_tier() -> None:
    below, closed = StackUnderTest(), threading.Event()
    tier = below.tiers[0]

    def close(_: object) -> None:
        below.stack.close()
        closed.set()

    tier.gate.clear()
    match = below.stack.match(keys_of("a", 2))
    assert tier.waiting.acquire(timeout=LONG)
    match.add_done_callback(close)  # called by the stack's own thread
    tier.gate.set()
    assert closed.wait(LONG)
    assert tier.closed
    with pytest.raises(ValueError, match="released"):
        below.front.slab.view(0)


@pytest.mark.parametrize("name", [*RAISED, *RETURNED])
def test_usage_that_goes_wrong_is_unknown(below: StackUnderTest, name: str) -> None:
    wrong = wrongs("usage").get(f"raises {name}") or (lambda: RETURNED[name](1))
    below.tiers[0].usage = wrong  # type: ignore[method-assign]
    usage = below.stack.stats().lower[0].usage
    assert usage == Tier.usage(below.tiers[0])


def test_usage_that_hangs_is_what_it_was(below: StackUnderTest) -> None:
    tier, keys = below.tiers[0], keys_of("a", 2)
    tier.usage = lambda: TierUsage(7)  # type: ignore[method-assign]
    assert below.stack.stats().lower[0].usage == TierUsage(7)
    go, asked = threading.Event(), threading.Semaphore(0)

    def hangs() -> TierUsage:
        asked.release()
        go.wait()
        return TierUsage(8)

    tier.usage = hangs  # type: ignore[method-assign]
    for _ in range(3):
        assert below.stack.stats().lower[0].usage == TierUsage(7)
    assert asked.acquire(timeout=LONG)
    assert not asked.acquire(blocking=False)  # it is not asked again meanwhile
    below.put(keys)
    assert below.stack.flush(LONG)
    below.front.clear()
    assert below.fetch_count(keys) == 2
    go.set()
    below.stack.close()
    assert below.stack.stats().lower[0].usage == TierUsage(8)


def test_usage_that_a_signal_interrupts_ends_the_process(below: StackUnderTest) -> None:
    def ends(*_: object) -> None:
        raise SystemExit

    def interrupted() -> TierUsage:
        os.kill(os.getpid(), signal.SIGTERM)
        return TierUsage()

    below.tiers[0].usage = interrupted  # type: ignore[method-assign]
    before = signal.signal(signal.SIGTERM, ends)
    try:
        with pytest.raises(SystemExit):
            below.stack.stats()
        del below.tiers[0].usage
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", [*RAISED, *RETURNED])
def test_a_namespace_that_goes_wrong_costs_the_calls_until_it_is_known(name: str) -> None:
    def wrong(*_: object) -> Any:
        if name in RETURNED:
            return RETURNED[name](1)
        error = RAISED[name]()
        raise error

    below = StackUnderTest()
    kept = keys_of("kept", 2)
    below.put_in_tier(kept)
    below.tiers[0].resolve = wrong  # type: ignore[assignment,method-assign]
    assert below.fetch_count(kept) == 0
    below.put(keys_of("stored", 1))
    assert below.stack.flush(LONG)
    assert adds_up(below).errors == 2
    del below.tiers[0].resolve
    assert below.fetch_count(kept) == 2
    below.check_invariants()
    below.stack.close()


@pytest.mark.parametrize("name", RAISED)
def test_a_reset_that_goes_wrong_is_a_reset_of_this_stack(name: str) -> None:
    def wrong(*_: object) -> None:
        error = RAISED[name]()
        raise error

    below = StackUnderTest()
    below.tiers[0].forget = wrong  # type: ignore[assignment,method-assign]
    below.put(keys_of("a", 2))
    assert below.stack.flush(LONG)
    below.stack.clear()
    assert below.fetch_count(keys_of("a", 2)) == 0
    below.check_invariants()
    below.stack.close()


def test_a_write_that_hangs_as_the_probe_keeps_nobody_from_asking_later() -> None:
    now = 0.0
    below = StackUnderTest(blocks_per_call=1, calls=2, clock=lambda: now)
    tier, keys = below.tiers[0], keys_of("a", 2)
    below.put_in_tier(keys)
    tier.fault = "raise"
    for _ in range(3):
        assert below.fetch_count(keys) == 0
    tier.fault = ""
    now = 1.0
    tier.gate.clear()
    below.put(keys_of("stored", 1))  # the probe
    assert tier.waiting.acquire(timeout=LONG)
    right, tier.gate = tier.gate, threading.Event()
    tier.gate.set()
    assert below.fetch_count(keys) == 0
    now = 61.0
    assert below.fetch_count(keys) == 2
    right.set()
    assert below.stack.flush(LONG)
    below.check_invariants()
    below.stack.close()
