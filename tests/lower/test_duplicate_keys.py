"""A chain with a key twice: the stack stores and loads the key once."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.keys import namespaced_key
from kvcache.testing import keys_of
from tests.support.failing_parts import FaultyTier
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest


class StoreRecorder(FaultyTier):
    """Records the keys that are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[bytes] = []

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.stored += keys
        return super().store(keys, blocks, parent)


def test_chain_with_a_key_twice_is_stored_and_loaded_once() -> None:
    tier = StoreRecorder()
    under_test = StackUnderTest(tiers=[tier], blocks_per_call=8)
    a, b, c = keys_of("twice", 3)
    chain = [a, b, a, c, b]
    with under_test.stack:
        assert under_test.put(chain) == 3
        assert under_test.stack.flush(LONG)
        under_test.front.clear()
        assert under_test.fetch_count(chain) == 5
        under_test.check_index()
    once = sorted(namespaced_key(NAMESPACE, key) for key in (a, b, c))
    assert sorted(tier.stored) == sorted(tier.read) == once
