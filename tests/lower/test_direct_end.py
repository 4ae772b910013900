"""Direct tiers and what ends their use: a reset, close, a fork, a Python without a GIL."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from kvcache.lower.direct import DirectTiers
from kvcache.process import ForkedError
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from tests.support.direct_under_test import DirectUnderTest
from tests.support.failing_parts import DictTier, FaultyTier
from tests.support.forked_children import run_in_child
from tests.support.stack_under_test import LONG

KEYS = keys_of("a", 6)
SOON_S = 0.02
ALL, NONE = [True] * 6, [False] * 6


@pytest.fixture
def under_test() -> Iterator[DirectUnderTest]:
    under_test = DirectUnderTest(tiers=2)
    yield under_test
    under_test.close()


def test_clear_earlier_blocks_are_not_found(under_test: DirectUnderTest) -> None:
    under_test.put(KEYS)
    assert not under_test.direct.clear()  # the tiers of the test forget nothing
    assert under_test.direct.contains(KEYS) == NONE
    assert under_test.get(KEYS) == NONE
    assert under_test.put(KEYS) == ALL
    assert under_test.get(KEYS) == ALL
    assert len(under_test.tiers[0].held) == 12


def test_clear_with_a_namespace_lets_two_processes_share_blocks_again() -> None:
    shared = DictTier()
    first, second = DirectUnderTest([FaultyTier(shared)]), DirectUnderTest([FaultyTier(shared)])
    for each in (first, second):
        each.direct.clear(b"m" * 32)
    assert first.put(KEYS) == ALL
    assert second.get(KEYS) == ALL
    assert {name[:32] for name in shared.held} == {b"m" * 32}
    first.close()
    second.close()


def test_store_that_began_before_a_clear_is_not_found_after_it() -> None:
    under_test = DirectUnderTest(calls=1)
    under_test.hang()
    store = threading.Thread(target=lambda: under_test.put(KEYS))
    store.start()
    assert under_test.tiers[0].waiting.acquire(timeout=LONG)
    [tier] = under_test.direct.tiers
    tier.channel.reset()
    under_test.tiers[0].gate.set()
    store.join(LONG)
    assert under_test.direct.contains(KEYS) == NONE
    under_test.close()


def test_store_of_several_calls_during_a_clear_is_not_found_after_it() -> None:
    """The calls that begin after the clear belong to the store from before it."""
    keys = keys_of("long", 40)
    under_test = DirectUnderTest(calls=1)
    under_test.hang()
    store = threading.Thread(target=lambda: under_test.put(keys))
    store.start()
    assert under_test.tiers[0].waiting.acquire(timeout=LONG)
    under_test.direct.tiers[0].channel.reset()
    under_test.tiers[0].gate.set()
    store.join(LONG)
    assert under_test.direct.contains(keys) == [False] * 40
    under_test.close()


def test_store_that_is_queued_during_a_clear_is_dropped() -> None:
    under_test = DirectUnderTest(calls=1)
    [tier] = under_test.direct.tiers
    under_test.hang()
    lookup = threading.Thread(target=lambda: under_test.direct.contains(KEYS))
    lookup.start()
    assert under_test.tiers[0].waiting.acquire(timeout=LONG)
    held: list[list[bool]] = []
    store = threading.Thread(target=lambda: held.append(under_test.put(KEYS)))
    queued = threading.Event()
    add_job = tier.channel.workers.add_job

    def add_and_notify(*job: object) -> None:
        add_job(*job)  # type: ignore[arg-type]
        queued.set()

    tier.channel.workers.add_job = add_and_notify  # type: ignore[method-assign, assignment]
    store.start()
    assert queued.wait(LONG)
    tier.channel.reset()
    under_test.tiers[0].gate.set()
    for thread in (lookup, store):
        thread.join(LONG)
    assert held == [NONE]
    assert under_test.tiers[0].held == {}
    assert under_test.direct.stats().lower[0].dropped_blocks == 6
    under_test.close()


def test_call_after_close_finds_and_stores_nothing(under_test: DirectUnderTest) -> None:
    under_test.put(KEYS)
    under_test.direct.close()
    under_test.direct.close()
    assert under_test.tiers[0].closed
    assert under_test.tiers[1].closed
    assert under_test.direct.contains(KEYS) == NONE
    assert under_test.get(KEYS) == NONE
    assert under_test.put(KEYS) == NONE
    assert not under_test.direct.accepts_calls


def test_close_ends_the_calls_that_wait() -> None:
    under_test = DirectUnderTest(calls=1)
    under_test.hang()
    answers: list[list[bool]] = []
    callers = [
        threading.Thread(target=lambda: answers.append(under_test.get(KEYS))) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    assert under_test.tiers[0].waiting.acquire(timeout=LONG)
    closing = threading.Thread(target=lambda: under_test.direct.close(LONG))
    closing.start()
    while not under_test.direct.tiers[0].channel.closed:
        pass
    under_test.tiers[0].gate.set()
    for thread in (*callers, closing):
        thread.join(LONG)
        assert not thread.is_alive()
    assert answers == [NONE] * 3
    under_test.check_memory()


def test_close_of_a_tier_that_hangs_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    allowed = threading.Event()

    class HangingCloseTier(FaultyTier):
        def close(self) -> None:
            allowed.wait(LONG)

    under_test = DirectUnderTest([HangingCloseTier()])
    under_test.direct.close(timeout_s=SOON_S)
    assert "kvcache: tier t1: close hangs; it is left open" in caplog.text
    allowed.set()


def test_forked_child_cannot_use_direct_tiers(under_test: DirectUnderTest) -> None:
    under_test.put(KEYS)
    direct = under_test.direct

    def use() -> int:
        refused = 0
        for call in (
            lambda: direct.contains(KEYS),
            lambda: direct.load(KEYS, [bytearray(1)] * 6),
            lambda: direct.store(KEYS, [b"x"] * 6),
            direct.clear,
            direct.stats,
        ):
            try:
                call()
            except ForkedError:
                refused += 1
        direct.close()
        return refused

    assert run_in_child(use) == 5
    assert under_test.get(KEYS) == ALL


def test_python_without_a_gil_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(RuntimeError, match="direct tiers need Python's GIL"):
        DirectTiers([], profile="test", block_nbytes=PAGE)
