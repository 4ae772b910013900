"""KV events of a stack: their fields, their bounds, and that nothing is recorded when they are off.

`tests/e2e/test_events.py` compares them with an engine's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from kvcache.connectors.vllm.scheduler import events
from kvcache.connectors.vllm.scheduler.events import EventSource, StackEvents, events_of
from kvcache.events import BlockEvents
from kvcache.testing import keys_of
from tests.support.played_engine import BLOCK, cache_config, full_attention
from tests.support.stack_under_test import LONG, StackUnderTest

pytestmark = pytest.mark.engine

SLOTS = 16
HALF = BLOCK // 2


@dataclass(frozen=True)
class Group:
    """The parts of a kept group that events read; a hash of vLLM covers `hash_tokens`."""

    index: int
    members: tuple[int, ...]
    block_tokens: int = BLOCK
    hash_tokens: int = BLOCK

    def hashes(self, block_hashes: Sequence[bytes], first: int, end: int) -> Sequence[bytes]:
        per = self.block_tokens // self.hash_tokens
        return block_hashes[first * per + per - 1 : end * per : per]


ALONE: Any = Group(0, (0,))


def sliding_window() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    heads = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    return SlidingWindowSpec(block_size=BLOCK, sliding_window=64, **heads)


def request_of(hashes: Sequence[bytes], **more: Any) -> Any:
    """Return the parts of a vLLM request that events read."""
    read = {
        "all_token_ids": list(range(len(hashes) * BLOCK)),
        "block_hashes": list(hashes),
        "lora_request": None,
        "mm_features": [],
        "cache_salt": None,
        "prompt_embeds": None,
        "prompt_is_token_ids": None,
    }
    return SimpleNamespace(**read | more)


def events_of_one_group(stack: Any, **more: Any) -> StackEvents:
    return StackEvents(cache_config(full_attention()), [ALONE], stack, [1], **more)


def describe(published: EventSource, keys: Sequence[bytes], **more: Any) -> None:
    """Describe the blocks of a request; its keys are its hashes."""
    published.describe(request_of(keys, **more), ALONE, range(len(keys)), keys)


def in_medium(made: Sequence[Any], medium: str = "CPU") -> list[Any]:
    return [event for event in made if event.medium == medium]


def hashes_of(made: Sequence[Any], medium: str = "CPU") -> tuple[list[Any], list[Any]]:
    """Return the hashes of the blocks stored in a medium, and of those removed from it."""
    stored: list[Any] = []
    removed: list[Any] = []
    for event in in_medium(made, medium):
        (stored if type(event).__name__ == "BlockStored" else removed).extend(event.block_hashes)
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
    published = events_of_one_group(below.stack)
    keys = keys_of("a", 4)
    describe(published, keys, lora_request=LoRARequest("poet", 7, "adapters/poet"), cache_salt="s")
    below.put(keys[1:3], keys[0])
    below.put(keys[3:], keys[2])
    below.put(keys[:1])
    tail, last, head = in_medium(published.take())
    assert tail.block_hashes == keys[1:3]
    assert tail.parent_block_hash == keys[0]
    assert tail.token_ids == list(range(BLOCK, 3 * BLOCK))
    assert (tail.block_size, tail.group_idx, tail.lora_id, tail.lora_name) == (BLOCK, 0, 7, "poet")
    assert (tail.kv_cache_spec_kind, tail.kv_cache_spec_sliding_window) == ("full_attention", None)
    assert tail.extra_keys == [("poet",), ("poet",)]
    assert (last.block_hashes, last.parent_block_hash) == (keys[3:], keys[2])
    assert (head.block_hashes, head.parent_block_hash) == (keys[:1], None)
    assert head.extra_keys == [("poet", "s")]


def test_events_of_an_adapter_have_vllms_own_hashes(below: StackUnderTest) -> None:
    """The tiers have its blocks under other keys."""
    published = events_of_one_group(below.stack)
    keys = keys_of("a", 3)
    hashes = [key[::-1] for key in keys]
    published.describe(request_of(hashes), ALONE, range(1, 3), keys[1:])
    below.put(keys[1:], keys[0])
    [stored] = in_medium(published.take())
    assert stored.block_hashes == hashes[1:]
    assert stored.parent_block_hash == hashes[0]
    below.stack.front.remove(keys[1:])
    [removed] = in_medium(published.take())
    assert set(removed.block_hashes) == set(stored.block_hashes)


def test_events_of_an_undescribed_block_come_once_it_is_described(
    below: StackUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_AHEAD", 0)
    published = events_of_one_group(below.stack)
    keys = keys_of("a", 2)
    describe(published, keys)
    describe(published, keys_of("others", 2 * SLOTS))
    assert published.described_parts == 2 * SLOTS
    below.put(keys)
    assert hashes_of(published.take()) == ([], [])
    describe(published, keys)
    assert hashes_of(published.take()) == (keys, [])
    below.front.remove(keys)
    assert hashes_of(published.take()) == ([], keys)
    below.put(keys_of("undescribed", 1))
    below.stack.clear()
    published.take()
    assert published.tracked_parts == 0


def test_events_of_a_lower_tier_are_bounded(
    below: StackUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_ANNOUNCED", 3)
    published = events_of_one_group(below.stack)
    for name in "abc":
        describe(published, keys_of(name, 2))
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


@pytest.mark.parametrize("hidden", ["CPU", "STORAGE"])
def test_events_of_a_tier_that_is_not_announced_are_left_out(hidden: str) -> None:
    with_events = StackUnderTest(
        slots=SLOTS, announce_front=hidden != "CPU", announce=hidden != "STORAGE"
    )
    shown = {"CPU": "STORAGE", "STORAGE": "CPU"}[hidden]
    keys = keys_of("a", 4)
    with with_events.stack as stack:
        published = events_of_one_group(stack)
        describe(published, keys)
        with_events.put(keys)
        assert stack.flush(LONG)
        made = published.take()
        assert hashes_of(made, shown) == (keys, [])
        assert hashes_of(made, hidden) == ([], [])
        with_events.front.clear()
        assert with_events.fetch_count(keys) == 4  # from the lower tier
        with_events.front.remove(keys[3:])
        assert in_medium(published.take(), hidden) == []
        stack.clear()
        made = published.take()
        assert {*hashes_of(made, shown)[1]} >= {*keys[:3]}
        assert in_medium(made, hidden) == []


def test_events_without_an_announced_tier_are_off() -> None:
    on: Any = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))
    with StackUnderTest(announce_front=False, announce=False).stack as stack:
        source = events_of(on, cache_config(full_attention()), [ALONE], stack, [1])
        assert type(source) is EventSource


def test_events_off_subscribe_to_nothing(
    below: StackUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribed: list[object] = []
    monkeypatch.setattr(below.front, "subscribe", subscribed.append)
    cache = cache_config(full_attention())
    for config in (
        SimpleNamespace(),
        SimpleNamespace(kv_events_config=None),
        SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=False)),
    ):
        off = events_of(config, cache, [ALONE], below.stack, [1])
        assert type(off) is EventSource
        assert not off.publishes
    describe(off, keys_of("a", 1))
    below.put(keys_of("a", 1))
    assert not off.take()
    assert not subscribed
    assert type(below.lower[0].channel.events) is BlockEvents
    on: Any = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))
    source = events_of(on, cache, [ALONE], below.stack, [1])
    assert type(source) is StackEvents
    assert source.publishes


def test_events_leave_out_fields_that_this_vllm_lacks(below: StackUnderTest) -> None:
    class Older:
        __struct_fields__ = ("block_hashes", "medium")

        def __init__(self, block_hashes: list[bytes], medium: str) -> None:
            self.block_hashes, self.medium = block_hashes, medium

    published = events_of_one_group(below.stack, kv_events=SimpleNamespace(BlockStored=Older))
    describe(published, keys_of("a", 1))
    below.put(keys_of("a", 1))
    made = published.take()
    assert [event.block_hashes for event in in_medium(made)] == [keys_of("a", 1)]


class TestSeveralGroups:
    """Full attention in blocks of half the size, and two of vLLM's groups of a sliding window.

    A block of the window group has three parts.
    """

    full: Any = Group(0, (1,), block_tokens=HALF, hash_tokens=HALF)
    window: Any = Group(1, (0, 2), hash_tokens=HALF)

    @pytest.fixture
    def published(self, below: StackUnderTest) -> StackEvents:
        full = replace(full_attention(), block_size=HALF)
        cache = cache_config(sliding_window(), full, sliding_window())
        return StackEvents(cache, [self.full, self.window], below.stack, [1, 3])

    @staticmethod
    def parts_of(hashes: Sequence[bytes]) -> list[bytes]:
        return [key + bytes((1, part)) for key in hashes for part in range(3)]

    @pytest.fixture
    def request_(self) -> Any:
        return request_of(keys_of("a", 6), all_token_ids=list(range(3 * BLOCK)))

    def test_events_of_a_block_are_one_for_each_of_vllms_groups(
        self, below: StackUnderTest, published: StackEvents, request_: Any
    ) -> None:
        hashes = request_.block_hashes
        window_keys = self.parts_of(hashes[1::2])
        published.describe(request_, self.full, range(6), hashes)
        published.describe(request_, self.window, [1, 2], window_keys[3:])
        below.put(hashes[:6])
        below.put(window_keys[3:], hashes[3])
        full, *windows = in_medium(published.take())
        assert full.block_hashes == hashes
        assert (full.group_idx, full.block_size, full.parent_block_hash) == (1, HALF, None)
        assert full.kv_cache_spec_kind == "full_attention"
        assert full.kv_cache_spec_sliding_window is None
        assert [event.group_idx for event in windows] == [0, 2]
        for event in windows:
            assert event.block_hashes == [hashes[3], hashes[5]]
            assert event.parent_block_hash == hashes[1]  # not stored: the window begins after it
            assert event.token_ids == list(range(BLOCK, 3 * BLOCK))
            assert event.block_size == BLOCK
            assert event.kv_cache_spec_kind == "sliding_window"
            assert event.kv_cache_spec_sliding_window == 64

    def test_events_of_windows_with_a_gap_are_two_segments(
        self, below: StackUnderTest, published: StackEvents, request_: Any
    ) -> None:
        hashes, keys = request_.block_hashes, self.parts_of(request_.block_hashes[1::2])
        published.describe(request_, self.window, [0, 2], keys[:3] + keys[6:])
        below.put(keys[:3] + keys[6:])
        made = [event for event in in_medium(published.take()) if event.group_idx == 2]
        assert [event.block_hashes for event in made] == [[hashes[1]], [hashes[5]]]
        assert [event.parent_block_hash for event in made] == [None, hashes[3]]

    def test_events_store_a_block_with_its_last_part(
        self, below: StackUnderTest, published: StackEvents, request_: Any
    ) -> None:
        hashes, keys = request_.block_hashes, self.parts_of(request_.block_hashes[1:2])
        published.describe(request_, self.window, [0], keys)
        below.put(keys[:1])
        below.put(keys[2:], keys[1])
        assert in_medium(published.take()) == []
        below.put(keys[1:2], keys[0])
        assert hashes_of(published.take()) == ([hashes[1]] * 2, [])

    def test_events_remove_a_block_with_its_first_part(
        self, below: StackUnderTest, published: StackEvents, request_: Any
    ) -> None:
        hashes, keys = request_.block_hashes, self.parts_of(request_.block_hashes[1:2])
        published.describe(request_, self.window, [0], keys)
        below.put(keys)
        published.take()
        below.front.remove(keys[2:])
        removed = in_medium(published.take())
        assert [(event.group_idx, event.block_hashes) for event in removed] == [
            (0, [hashes[1]]),
            (2, [hashes[1]]),
        ]
        below.front.remove(keys[:2])
        assert in_medium(published.take()) == []
        below.put(keys)
        assert hashes_of(published.take()) == ([hashes[1]] * 2, [])

    def test_events_of_parts_described_later_come_with_the_description(
        self, below: StackUnderTest, published: StackEvents, request_: Any
    ) -> None:
        hashes, keys = request_.block_hashes, self.parts_of(request_.block_hashes[1:2])
        below.put(keys)
        assert in_medium(published.take()) == []
        published.describe(request_, self.window, [0], keys)
        assert hashes_of(published.take()) == ([hashes[1]] * 2, [])

    def test_events_of_an_adapter_and_a_salt_are_those_of_every_group(
        self, below: StackUnderTest, published: StackEvents, request_: Any
    ) -> None:
        request_.lora_request = LoRARequest("poet", 7, "adapters/poet")
        request_.cache_salt = "s"
        keys = [key[::-1] for key in request_.block_hashes]  # with the adapter's identity
        window_keys = self.parts_of(keys[1::2])
        published.describe(request_, self.full, range(2), keys[:2])
        published.describe(request_, self.window, range(2), window_keys[:6])
        below.put(keys[:2])
        below.put(window_keys[:6])
        full, *windows = in_medium(published.take())
        assert full.block_hashes == request_.block_hashes[:2]
        assert full.extra_keys == [("poet", "s"), ("poet",)]
        for event in windows:
            assert event.block_hashes == request_.block_hashes[1:4:2]
            assert (event.lora_id, event.extra_keys) == (7, [("poet", "s"), ("poet",)])
        below.stack.clear()
        assert len(in_medium(published.take())) == 3
        assert published.tracked_parts == 0
