"""What a reset does to one tier: how it is told, and what is on its way to it then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest

from kvcache.lower.namespace import TierNamespace
from kvcache.testing import keys_of
from tests.support.failing_parts import Faulty
from tests.support.stack_under_test import NAMESPACE, StackUnderTest

KEYS = keys_of("chain", 4)


class Forgetful(Faulty):
    """Forgets when it is told; renames the namespace, as the tiers of this project do."""

    def __init__(self) -> None:
        super().__init__()
        self.name = NAMESPACE
        self.failing = 0  # calls of forget that raise
        self.forgotten: list[bytes] = []
        self.asked = 0
        self.stored_names: list[bytes] = []
        self.before_store = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def resolve(self, namespace: bytes, about: str) -> bytes:
        self.asked += 1
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
        self.before_store.set()
        assert self.go_on.wait(20)
        self.stored_names += keys
        return super().store(keys, blocks, parent)


@pytest.fixture
def below(monkeypatch: pytest.MonkeyPatch) -> StackUnderTest:
    monkeypatch.setattr("tests.support.stack_under_test.Faulty", Forgetful)
    return StackUnderTest()


def tier_of(below: StackUnderTest) -> Forgetful:
    [tier] = below.tiers
    assert isinstance(tier, Forgetful)
    return tier


def test_resolve_is_asked_once_and_names_the_blocks(below: StackUnderTest) -> None:
    tier = tier_of(below)
    tier.name = b"k" * 32
    below.put(KEYS)
    assert below.stack.flush(20)
    assert set(tier.stored_names) == {tier.name + key for key in KEYS}
    assert tier.asked == 1
    below.stack.close()


def test_clear_forgets_the_namespace_once(below: StackUnderTest) -> None:
    tier = tier_of(below)
    assert below.stack.clear()
    assert below.stack.clear()  # the random one that was left is known to no other stack
    assert tier.forgotten == [NAMESPACE]
    below.stack.close()


def test_clear_tier_that_cannot_forget_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    below = StackUnderTest()  # of a tier with the contract's default
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert not below.stack.clear()
    assert "a reset was not written (not supported)" in caplog.text
    assert below.stack.stats().lower[0].errors == 0
    below.stack.close()


def test_clear_forget_that_fails_is_logged_and_done_before_the_next_write(
    below: StackUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tier_of(below)
    tier.failing = 2
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert not below.stack.clear()
    assert "a reset was not written (OSError)" in caplog.text
    for _ in range(2):  # the first write costs no block, though forgetting fails again
        keys = keys_of(f"after {len(tier.stored_names)}", 2)
        below.put(keys)
        assert below.stack.flush(20)
    assert len(tier.stored_names) == 4
    assert tier.forgotten == [NAMESPACE]
    below.stack.close()


def test_clear_blocks_that_wait_to_be_written_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.support.stack_under_test.Faulty", Forgetful)
    below = StackUnderTest(calls=1)
    tier, [lower] = tier_of(below), below.lower
    tier.go_on.clear()
    below.put(KEYS[:1])
    assert tier.before_store.wait(20)  # one write is under way, the next one waits
    below.put(keys_of("second", 3))
    answer = lower.start_clear()
    tier.go_on.set()
    assert lower.finish_clear(answer)
    assert below.stack.flush(20)
    assert tier.stored_names == [NAMESPACE + KEYS[0]]  # the name of before, which no stack asks for
    stats = below.stack.stats().lower[0]
    assert (stats.stored_blocks, stats.dropped_blocks) == (1, 3)
    below.check_invariants()
    below.stack.close()


def test_names_namespace_left_before_it_was_resolved_fails() -> None:
    """Else what is late would be stored under the name that the next opening asks for."""
    tier = Forgetful()
    spaces = TierNamespace(tier, NAMESPACE)
    spaces.reset()
    assert spaces.forget()
    with pytest.raises(Exception, match="reset"):
        spaces.names(NAMESPACE, KEYS)
    assert spaces.names(spaces.current, KEYS) == [spaces.current + key for key in KEYS]


@pytest.mark.parametrize("name", [None, b"short", "text"])
def test_names_tier_that_returns_no_namespace_fails(name: object) -> None:
    tier = Forgetful()
    tier.name = name  # type: ignore[assignment]
    with pytest.raises(Exception, match="namespace"):
        TierNamespace(tier, NAMESPACE).names(NAMESPACE, KEYS)
