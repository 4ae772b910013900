"""A reset in one lower tier: how the tier forgets, and what happens to queued blocks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest

from kvcache.lower.namespace import TierNamespace
from kvcache.testing import keys_of
from tests.support.failing_parts import FaultyTier
from tests.support.stack_under_test import NAMESPACE, StackUnderTest

KEYS = keys_of("chain", 4)


class ForgettingTier(FaultyTier):
    """Supports ``forget``, and then names the namespace anew, as the tiers of this project do."""

    def __init__(self) -> None:
        super().__init__()
        self.name = NAMESPACE
        self.failing = 0  # how many of the next calls of forget() raise
        self.forgotten: list[bytes] = []
        self.resolve_calls = 0
        self.stored_names: list[bytes] = []
        self.store_begun = threading.Event()
        self.store_allowed = threading.Event()
        self.store_allowed.set()

    def resolve(self, namespace: bytes, about: str) -> bytes:
        self.resolve_calls += 1
        return self.name

    def forget(self, namespace: bytes) -> None:
        if self.failing:
            self.failing -= 1
            raise OSError("no space left")
        self.forgotten.append(namespace)
        self.name = b"r" * 32

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.store_begun.set()
        assert self.store_allowed.wait(20)
        self.stored_names += keys
        return super().store(keys, blocks, parent)


@pytest.fixture
def tier() -> ForgettingTier:
    return ForgettingTier()


@pytest.fixture
def under_test(tier: ForgettingTier) -> StackUnderTest:
    return StackUnderTest(tiers=[tier])


def test_resolve_is_called_once_and_names_the_blocks(
    under_test: StackUnderTest, tier: ForgettingTier
) -> None:
    tier.name = b"k" * 32
    under_test.put(KEYS)
    assert under_test.stack.flush(20)
    assert set(tier.stored_names) == {tier.name + key for key in KEYS}
    assert tier.resolve_calls == 1
    under_test.stack.close()


def test_clear_forgets_the_namespace_once(under_test: StackUnderTest, tier: ForgettingTier) -> None:
    assert under_test.stack.clear()
    assert under_test.stack.clear()  # no other stack has the random namespace that this one leaves
    assert tier.forgotten == [NAMESPACE]
    under_test.stack.close()


def test_clear_tier_without_forget_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    under_test = StackUnderTest()  # a tier with the default forget()
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert not under_test.stack.clear()
    assert "a reset was not written (not supported)" in caplog.text
    assert under_test.stack.stats().lower[0].errors == 0
    under_test.stack.close()


def test_clear_failed_forget_is_logged_and_tried_before_the_next_write(
    under_test: StackUnderTest, tier: ForgettingTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier.failing = 2
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert not under_test.stack.clear()
    assert "a reset was not written (OSError)" in caplog.text
    for _ in range(2):  # forget() fails again in the first write, which loses no block
        keys = keys_of(f"after {len(tier.stored_names)}", 2)
        under_test.put(keys)
        assert under_test.stack.flush(20)
    assert len(tier.stored_names) == 4
    assert tier.forgotten == [NAMESPACE]
    under_test.stack.close()


def test_clear_queued_blocks_are_dropped(tier: ForgettingTier) -> None:
    under_test = StackUnderTest(tiers=[tier], calls=1)
    [lower] = under_test.lower
    tier.store_allowed.clear()
    under_test.put(KEYS[:1])
    assert tier.store_begun.wait(20)  # this write is running, and the next one waits
    under_test.put(keys_of("second", 3))
    call = lower.start_clear()
    tier.store_allowed.set()
    assert lower.finish_clear(call)
    assert under_test.stack.flush(20)
    assert tier.stored_names == [NAMESPACE + KEYS[0]]  # a name that no stack asks for any more
    stats = under_test.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.dropped_blocks) == (1, 3)
    under_test.check_invariants()
    under_test.stack.close()


def test_names_of_a_namespace_reset_before_it_was_resolved_fail() -> None:
    """Otherwise late blocks would be stored under the name that the next opening asks for."""
    tier = ForgettingTier()
    namespace = TierNamespace(tier, NAMESPACE)
    namespace.reset()
    assert namespace.forget()
    with pytest.raises(Exception, match="reset"):
        namespace.names(NAMESPACE, KEYS)
    assert namespace.names(namespace.current, KEYS) == [namespace.current + key for key in KEYS]


@pytest.mark.parametrize("name", [None, b"short", "text"])
def test_names_of_a_tier_that_returns_no_namespace_fail(name: object) -> None:
    tier = ForgettingTier()
    tier.name = name  # type: ignore[assignment]
    with pytest.raises(Exception, match="namespace"):
        TierNamespace(tier, NAMESPACE).names(NAMESPACE, KEYS)
