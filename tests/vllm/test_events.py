"""KV events of a stack: their fields, their bounds, and that nothing is recorded when they are off.

`tests/e2e/test_events.py` compares them with an engine's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from kvcache.connectors.vllm import events
from kvcache.connectors.vllm.events import EventSource, StackEvents, events_of
from kvcache.events import BlockEvents
from kvcache.testing import keys_of
from tests.support.played_engine import BLOCK, full_attention_group
from tests.support.stack_under_test import LONG, StackUnderTest

pytestmark = pytest.mark.engine

SLOTS = 16


def request_of(blocks: int, **more: Any) -> Any:
    """Return the parts of a vLLM request that events read."""
    read = {
        "all_token_ids": list(range(blocks * BLOCK)),
        "lora_request": None,
        "mm_features": [],
        "cache_salt": None,
        "prompt_embeds": None,
        "prompt_is_token_ids": None,
    }
    return SimpleNamespace(**read | more)


def hashes_of(made: Sequence[Any], medium: str = "CPU") -> tuple[list[Any], list[Any]]:
    """Return the hashes of the blocks stored in a medium, and of those removed from it."""
    stored: list[Any] = []
    removed: list[Any] = []
    for event in made:
        if event.medium == medium:
            (stored if type(event).__name__ == "BlockStored" else removed).extend(
                event.block_hashes
            )
    return stored, removed


@pytest.fixture(autouse=True)
def _whole_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")


@pytest.fixture
def below() -> Iterator[StackUnderTest]:
    below = StackUnderTest(slots=SLOTS, blocks_per_call=SLOTS)
    with below.stack:
        yield below


def test_events_of_a_segment_are_one_event(below: StackUnderTest) -> None:
    published = StackEvents(full_attention_group(), below.stack)
    keys = keys_of("a", 4)
    lora = LoRARequest("poet", 7, "adapters/poet")
    published.describe(request_of(4, lora_request=lora, cache_salt="s"), 0, keys, None)
    below.put(keys[1:3], keys[0])
    below.put(keys[3:], keys[2])
    below.put(keys[:1])
    tail, last, head = (event for event in published.take() if event.medium == "CPU")
    assert tail.block_hashes == keys[1:3]
    assert tail.parent_block_hash == keys[0]
    assert tail.token_ids == list(range(BLOCK, 3 * BLOCK))
    assert (tail.block_size, tail.group_idx, tail.lora_id, tail.lora_name) == (BLOCK, 0, 7, "poet")
    assert tail.extra_keys == [("poet",), ("poet",)]
    assert (last.block_hashes, last.parent_block_hash) == (keys[3:], keys[2])
    assert (head.block_hashes, head.parent_block_hash) == (keys[:1], None)
    assert head.extra_keys == [("poet", "s")]


def test_events_of_an_adapter_have_vllms_own_hashes(below: StackUnderTest) -> None:
    """The tiers have its blocks under other keys."""

    def other(_: Any, keys: list[bytes]) -> list[bytes]:
        return [key[::-1] for key in keys]

    published = StackEvents(full_attention_group(), below.stack)
    keys = keys_of("a", 3)
    published.describe(request_of(3), 1, keys[1:], keys[0], other)
    below.put(keys[1:], keys[0])
    [stored] = (event for event in published.take() if event.medium == "CPU")
    assert stored.block_hashes == [key[::-1] for key in keys[1:]]
    assert stored.parent_block_hash == keys[0][::-1]
    below.stack.front.remove(keys[1:])
    [removed] = (event for event in published.take() if event.medium == "CPU")
    assert set(removed.block_hashes) == set(stored.block_hashes)


def test_events_of_an_undescribed_block_come_once_it_is_described(
    below: StackUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_AHEAD", 0)
    published = StackEvents(full_attention_group(), below.stack)
    keys = keys_of("a", 2)
    published.describe(request_of(2), 0, keys, None)
    published.describe(request_of(2 * SLOTS), 0, keys_of("others", 2 * SLOTS), None)
    assert published.described_blocks == 2 * SLOTS
    below.put(keys)
    assert hashes_of(published.take()) == ([], [])
    published.describe(request_of(2), 0, keys, None)
    assert hashes_of(published.take()) == (keys, [])
    below.front.remove(keys)
    assert hashes_of(published.take()) == ([], keys)
    below.put(keys_of("undescribed", 1))
    below.stack.clear()
    published.take()
    assert published.tracked_blocks == 0


def test_events_of_a_lower_tier_are_bounded(
    below: StackUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_ANNOUNCED", 3)
    published = StackEvents(full_attention_group(), below.stack)
    for name in "abc":
        published.describe(request_of(2), 0, keys_of(name, 2), None)
        below.put(keys_of(name, 2))
        assert below.stack.flush(LONG)
    stored, removed = hashes_of(published.take(), "STORAGE")
    assert stored == [*keys_of("a", 2), *keys_of("b", 2), *keys_of("c", 2)]
    assert removed == [*keys_of("a", 2), *keys_of("b", 1)]
    below.front.clear()
    assert below.fetch_count(keys_of("b", 2)) == 2  # seen again: another one is now the oldest
    stored, removed = hashes_of(published.take(), "STORAGE")
    assert stored == keys_of("b", 1)
    assert removed == keys_of("c", 1)


def test_events_off_subscribe_to_nothing(
    below: StackUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribed: list[object] = []
    monkeypatch.setattr(below.front, "subscribe", subscribed.append)
    for config in (
        SimpleNamespace(),
        SimpleNamespace(kv_events_config=None),
        SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=False)),
    ):
        off = events_of(config, full_attention_group(), below.stack)
        assert type(off) is EventSource
    off.describe(request_of(1), 0, keys_of("a", 1), None)
    below.put(keys_of("a", 1))
    assert not off.take()
    assert not subscribed
    assert type(below.lower[0].channel.events) is BlockEvents
    on = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))
    assert type(events_of(on, full_attention_group(), below.stack)) is StackEvents


def test_events_leave_out_fields_that_this_vllm_lacks(below: StackUnderTest) -> None:
    class Older:
        __struct_fields__ = ("block_hashes", "medium")

        def __init__(self, block_hashes: list[bytes], medium: str) -> None:
            self.block_hashes, self.medium = block_hashes, medium

    published = StackEvents(
        full_attention_group(), below.stack, kv_events=SimpleNamespace(BlockStored=Older)
    )
    published.describe(request_of(1), 0, keys_of("a", 1), None)
    below.put(keys_of("a", 1))
    made = published.take()
    assert [event.block_hashes for event in made if event.medium == "CPU"] == [keys_of("a", 1)]
