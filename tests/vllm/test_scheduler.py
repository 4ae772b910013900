"""Stores and pending loads of the scheduler's side, called in vLLM's order.

The engine and its two ranks are played, with blocks of 32 tokens and a real L1.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")


from kvcache.connectors.vllm.messages import PieceOfRank
from kvcache.connectors.vllm.scheduler.side import SchedulerSide
from tests.support.played_engine import (  # fmt: skip
    BLOCK,
    SHARD,
    PlayedEngine,
    Request,
    cache_config,
    engine_config,
    full_attention,
    opened,
    shards,
)

pytestmark = pytest.mark.engine


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    engine = opened(monkeypatch, 32)
    yield engine
    engine.side.close()


# Stores


def test_store_has_full_blocks_alone(played: PlayedEngine) -> None:
    request = Request("a", 3 * BLOCK + 5)
    played.admit(request, [7, 3, 9, 4])
    step = played.step((request, request.num_tokens))
    assert step.loads == []
    [store] = step.stores
    assert store.blocks == [7, 3, 9]
    assert len(set(store.slots)) == 3
    assert played.held(request) == [False] * 3  # not before both ranks have acknowledged
    played.ack(store)
    assert played.held(request) == [True] * 3


def test_step_has_the_offset_of_each_shard(played: PlayedEngine) -> None:
    request = Request("a", BLOCK)
    played.admit(request, [0])
    memory = played.step((request, BLOCK)).memory
    [piece] = memory.pieces
    assert (piece.group, piece.member, piece.part) == (0, 0, 0)
    assert piece.ranks == {
        (0, 0): PieceOfRank(0, SHARD, 0), (0, 1): PieceOfRank(0, SHARD, SHARD)
    }  # fmt: skip
    assert memory.slab.slot_nbytes >= 2 * SHARD


def test_store_of_a_chunk_has_the_blocks_that_it_completes(played: PlayedEngine) -> None:
    request = Request("a", 5 * BLOCK)
    played.admit(request, [1, 2])
    blocks = []
    for tokens, more in [(48, []), (10, []), (60, [3, 4]), (42, [5])]:
        step = played.step((request, tokens), more={"a": more} if more else None)
        blocks.append([block for store in step.stores for block in store.blocks])
        played.ack(*step.stores)
    assert blocks == [[1], [], [2, 3], [4, 5]]
    assert played.held(request) == [True] * 5


def test_store_has_blocks_of_generated_tokens(played: PlayedEngine) -> None:
    request = Request("a", 60)
    played.admit(request, [1, 2])
    played.ack(*played.step((request, 60)).stores)
    offered = []
    for _ in range(6):
        request.num_tokens += 1  # sampled, and computed by the next step
        step = played.step((request, 1))
        offered.append([store.blocks for store in step.stores])
        played.ack(*step.stores)
    # The fourth step computes token 64.
    assert offered == [[], [], [], [[2]], [], []]


def test_store_leaves_out_drafted_tokens(played: PlayedEngine) -> None:
    request = Request("a", 60)
    played.admit(request, [1, 2])
    played.ack(*played.step((request, 60)).stores)
    request.num_tokens = 61
    step = played.step((request, 5))  # one known token and four drafted ones, up to 65
    assert step.stores == []
    request.num_computed_tokens = 61  # all were rejected
    request.num_tokens = 64
    [store] = played.step((request, 3)).stores
    assert store.blocks == [2]


def test_store_leaves_out_a_block_without_a_hash(played: PlayedEngine) -> None:
    request = Request("a", 2 * BLOCK)
    request.hash_tokens = 64  # one hash for two blocks
    played.admit(request, [1, 2])
    [store] = played.step((request, 64)).stores
    assert store.blocks == [1]
    request.num_tokens += 1
    request.hash_tokens = BLOCK  # now it has a hash
    [store] = played.step((request, 1)).stores
    assert store.blocks == [2]


def test_store_has_blocks_of_the_engines_own_cache(played: PlayedEngine) -> None:
    request = Request("a", 3 * BLOCK + 1)
    assert played.admit(request, [5, 6, 7, 8], own=2 * BLOCK) == 0
    [store] = played.step((request, BLOCK + 1)).stores
    assert store.blocks == [5, 6, 7]


def test_two_requests_that_compute_the_same_store_it_once(played: PlayedEngine) -> None:
    first, second = Request("a", 70, "same"), Request("b", 70, "same")
    played.admit(first, [1, 2, 3])
    played.admit(second, [1, 2, 4], own=64)
    [store] = played.step((first, 70), (second, 6)).stores
    assert store.blocks == [1, 2]


def test_store_after_a_hit_has_the_blocks_beyond_it(played: PlayedEngine) -> None:
    played.keep(Request("short", 2 * BLOCK, "same"), [1, 2])
    long = Request("long", 4 * BLOCK, "same")
    played.admit(long, [9, 8, 7, 6], own=0)
    step = played.step((long, long.num_tokens - long.num_computed_tokens))
    assert [load.blocks for load in step.loads] == [[9, 8]]
    assert [store.blocks for store in step.stores] == [[7, 6]]


def test_store_without_room_has_the_leading_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    played = opened(monkeypatch, 2)
    request = Request("a", 4 * BLOCK)
    played.admit(request, [1, 2, 3, 4])
    [store] = played.step((request, 4 * BLOCK)).stores
    assert store.blocks == [1, 2]
    played.ack(store)
    played.side.finish(request)
    assert played.is_idle()
    played.side.close()


def test_chain_stored_in_two_steps_is_evicted_from_its_tail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    played = opened(monkeypatch, 2)
    request = Request("a", 2 * BLOCK)
    played.admit(request, [1, 2])
    for _ in range(2):
        played.ack(*played.step((request, BLOCK)).stores)
    played.side.finish(request)
    played.keep(Request("b", BLOCK), [3])
    assert played.held(request) == [True, False]
    played.side.close()


def test_keys_with_several_hashes_per_block_are_the_last_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    played = opened(monkeypatch, 8, 16)
    request = Request("a", 3 * BLOCK + 16, hash_tokens=16)
    step = played.keep(request, [1, 2, 3, 4])
    assert [store.blocks for store in step.stores] == [[1, 2, 3]]
    # A block's key is the last of its hashes, which covers all tokens before it.
    assert played.held(request) == [False, True, False, True, False, True, False]
    again = Request("b", 3 * BLOCK + 16, "a", hash_tokens=16)
    assert played.admit(again, [4, 5, 6, 7]) == 3 * BLOCK
    played.side.close()


# Pending loads


def test_hit_is_pinned_loaded_once_and_unpinned(played: PlayedEngine) -> None:
    kept = played.keep(Request("a", 3 * BLOCK + 5, "same"), [1, 2, 3, 4])
    request = Request("b", 3 * BLOCK + 5, "same")
    assert played.admit(request, [11, 12, 13, 14]) == 3 * BLOCK
    assert played.l1.pinned_slots == 3
    step = played.step((request, 5))
    [load] = step.loads
    assert load.blocks == [11, 12, 13]
    assert load.slots == kept.stores[0].slots
    assert step.stores == []
    assert played.step((request, 1)).loads == []  # loaded once
    played.ack(load)
    assert played.l1.pinned_slots == 0


def test_load_leaves_out_the_engines_own_blocks(played: PlayedEngine) -> None:
    kept = played.keep(Request("a", 5 * BLOCK, "same"), [1, 2, 3, 4, 5])
    request = Request("b", 5 * BLOCK, "same")
    assert played.admit(request, [11, 12, 13, 14, 15], own=2 * BLOCK) == 2 * BLOCK
    [load] = played.step((request, BLOCK)).loads
    assert load.blocks == [13, 14]
    assert load.slots == kept.stores[0].slots[2:4]


def test_matched_tokens_leave_a_token_to_compute(played: PlayedEngine) -> None:
    played.keep(Request("a", 2 * BLOCK, "same"), [1, 2])
    for tokens, matched in [(2 * BLOCK, BLOCK), (2 * BLOCK + 1, 2 * BLOCK), (BLOCK, 0)]:
        request = Request("b", tokens, "same")
        assert played.side.matched_tokens(request, 0) == matched
        played.side.finish(request)
    assert played.is_idle()


def test_matched_tokens_twice_pin_and_count_once(played: PlayedEngine) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 2 * BLOCK + 1, "same")
    for _ in range(3):
        assert played.side.matched_tokens(request, 0) == 2 * BLOCK
    assert played.l1.pinned_slots == 2
    assert played.l1.hit_blocks == 2  # counted once
    played.side.finish(request)
    assert played.is_idle()


def test_matched_tokens_from_another_start_replace_the_pending_load(played: PlayedEngine) -> None:
    played.keep(Request("a", 3 * BLOCK + 1, "same"), [1, 2, 3, 4])
    request = Request("b", 3 * BLOCK + 1, "same")
    assert played.side.matched_tokens(request, 0) == 3 * BLOCK
    assert played.side.matched_tokens(request, BLOCK) == 2 * BLOCK
    assert played.l1.pinned_slots == 2
    assert played.side.matched_tokens(request, 3 * BLOCK) == 0
    assert played.l1.pinned_slots == 0


def test_matched_tokens_of_a_request_that_skips_reading_are_none(played: PlayedEngine) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 2 * BLOCK + 1, "same", skip_reading_prefix_cache=True)
    assert played.admit(request, [4, 5, 6]) == 0
    assert played.step((request, request.num_tokens)).loads == []
    assert played.l1.pinned_slots == 0


@pytest.mark.parametrize("taken", [0, BLOCK, 3 * BLOCK])
def test_admit_with_fewer_tokens_loads_fewer_blocks(played: PlayedEngine, taken: int) -> None:
    played.keep(Request("a", 3 * BLOCK + 1, "same"), [1, 2, 3, 4])
    request = Request("b", 3 * BLOCK + 1, "same", blocks=[11, 12, 13, 14])
    played.side.matched_tokens(request, 0)
    played.readmit(request, taken)
    request.num_computed_tokens = taken
    step = played.step((request, request.num_tokens - taken))
    loaded = [block for load in step.loads for block in load.blocks]
    assert loaded == [11, 12, 13][: taken // BLOCK]
    played.ack(*step.loads, *step.stores)
    played.side.finish(request)
    assert played.is_idle()


def test_pending_load_is_not_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    played = opened(monkeypatch, 4)
    kept = played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    waiting = Request("b", 2 * BLOCK + 1, "same")
    assert played.side.matched_tokens(waiting, 0) == 2 * BLOCK
    for n in range(5):
        step = played.keep(Request(f"traffic{n}", 3 * BLOCK), [5, 6, 7])
        slots = {slot for store in step.stores for slot in store.slots}
        assert not slots & set(kept.stores[0].slots)
    assert played.admit(waiting, [8, 9, 10]) == 2 * BLOCK
    played.side.close()


def test_aibrix_capacity_per_rank_is_the_sum_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB", str(8 * SHARD / 2**30))
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {})
    side.open(shards())
    assert side.stack is not None
    assert side.stack.front.slab.slots == 8
    side.close()
