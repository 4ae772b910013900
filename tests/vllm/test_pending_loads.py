"""Which hits are loaded within the step and which are async, and how requests wait for those."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks
from tests.support.played_engine import BLOCK, PlayedEngine, Request, opened

pytestmark = pytest.mark.engine


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    """L1 has four blocks, copies go on beside steps, and a load of a block takes 4 ms."""
    yield from playing(monkeypatch, async_copies=True)


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    """The same, but copies are made within the step."""
    yield from playing(monkeypatch, async_copies=False)


def playing(monkeypatch: pytest.MonkeyPatch, *, async_copies: bool) -> Iterator[PlayedEngine]:
    engine = opened(monkeypatch, 32, async_copies=async_copies)
    engine.keep(Request("kept", 4 * BLOCK + 1, name="known"), range(5))
    engine.keep(known_prompt("loads", 1), [0, 1], load_s=0.004)
    yield engine
    engine.side.close()


def known_prompt(name: str = "asks", blocks: int = 4) -> Request:
    return Request(name, blocks * BLOCK + 1, name="known")


def run_another(played: PlayedEngine) -> Request:
    runs = Request("runs", 10)
    played.admit(runs, [9])
    played.step((runs, 10))
    return runs


def test_long_load_is_async_if_other_requests_run(played: PlayedEngine) -> None:
    request = known_prompt()
    run_another(played)
    assert played.admit(request, [10, 11, 12, 13], scheduled=False) == 4 * BLOCK
    step = played.step()
    [load] = step.loads
    assert (load.blocks, load.awaited_by) == ([10, 11, 12, 13], "asks")
    played.ack(load)
    # The load has ended: vLLM admits the request again, with the tokens that it has now.
    request.blocks.append(14)
    played.readmit(request)
    step = played.step((request, 1))
    assert not step.loads
    assert not step.stores  # L1 has all of its blocks
    played.side.finish(request)
    assert not played.side.copying


@pytest.mark.parametrize("reason", ["alone", "short", "in the step"])
def test_load_is_within_the_step(played: PlayedEngine, in_step: PlayedEngine, reason: str) -> None:
    played = in_step if reason == "in the step" else played
    if reason != "alone":
        run_another(played)
    request = known_prompt(blocks=1 if reason == "short" else 4)
    assert played.side.matched_tokens(request, 0)
    assert not played.side.is_async(request)
    played.side.finish(request)


# The whole prompt


def whole_blocks(blocks: int = 4, name: str = "known") -> Request:
    return Request("whole", blocks * BLOCK, name=name)


def test_async_load_may_cover_the_whole_prompt(played: PlayedEngine) -> None:
    request = whole_blocks()
    run_another(played)
    assert played.admit(request, [10, 11, 12, 13], scheduled=False) == 4 * BLOCK
    assert played.side.is_async(request) is False  # vLLM has taken it
    assert played.l1.pinned_slots == 4
    [load] = played.step().loads
    assert (load.blocks, load.awaited_by) == ([10, 11, 12, 13], "whole")
    played.ack(load)
    # vLLM recomputes the last token, in a block that the request has.
    request.num_computed_tokens -= 1
    played.readmit(request)
    step = played.step((request, 1))
    assert not step.loads
    assert not step.stores
    assert {10, 11, 12, 13} <= set(step.fresh)  # vLLM writes there, so no copy may read them
    played.side.finish(request)
    assert played.l1.pinned_slots == 0


@pytest.mark.parametrize("reason", ["alone", "short", "in the step"])
def test_load_within_the_step_leaves_a_token(
    played: PlayedEngine, in_step: PlayedEngine, reason: str
) -> None:
    played = in_step if reason == "in the step" else played
    if reason != "alone":
        run_another(played)
    request = whole_blocks(1 if reason == "short" else 4)
    tokens = played.side.matched_tokens(request, 0)
    assert tokens == request.num_tokens - BLOCK
    assert not played.side.is_async(request)
    assert played.l1.pinned_slots == tokens // BLOCK
    played.side.finish(request)


def test_load_of_few_held_blocks_leaves_a_token(played: PlayedEngine) -> None:
    played.keep(Request("first", BLOCK + 1, name="half"), [20, 21])
    run_another(played)
    request = whole_blocks(2, "half")
    assert played.side.matched_tokens(request, 0) == BLOCK
    assert not played.side.is_async(request)
    played.side.finish(request)


def test_async_load_beyond_the_engines_blocks_may_cover_the_rest(played: PlayedEngine) -> None:
    run_another(played)
    request = whole_blocks()
    assert played.side.matched_tokens(request, 2 * BLOCK) == 2 * BLOCK  # 8 ms
    assert played.side.is_async(request)
    assert played.side.matched_tokens(request, 3 * BLOCK) == 0  # 4 ms
    played.side.finish(request)
    assert played.l1.pinned_slots == 0


def test_async_load_of_a_preempted_request_may_cover_its_answer(played: PlayedEngine) -> None:
    run_another(played)
    request = whole_blocks()
    request.num_prompt_tokens = 2 * BLOCK + 5  # it had generated the rest when it was preempted
    assert played.admit(request, [10, 11, 12, 13], scheduled=False) == 4 * BLOCK
    [load] = played.step().loads
    played.ack(load)
    played.side.finish(request)
    assert played.l1.pinned_slots == 0


def test_failed_load_of_a_whole_prompt_is_not_found_again(played: PlayedEngine) -> None:
    run_another(played)
    request = whole_blocks()
    played.admit(request, [10, 11, 12, 13], scheduled=False)
    [load] = played.step().loads
    played.ack(load, failed=True)
    assert played.held(request) == [False] * 4
    request.num_computed_tokens = 0
    assert played.admit(request, [10, 11, 12, 13]) == 0
    [store] = played.step((request, 4 * BLOCK)).stores
    assert store.blocks == [10, 11, 12, 13]
    played.ack(store)
    assert played.held(request) == [True] * 4
    played.side.finish(request)


def test_async_load_that_vllm_does_not_take_starts_no_wait(played: PlayedEngine) -> None:
    run_another(played)
    request = whole_blocks()
    assert played.side.matched_tokens(request, 0) == 4 * BLOCK
    request.blocks = [10, 11, 12, 13]
    played.readmit(request)
    assert not played.step((request, 4 * BLOCK)).loads
    assert played.l1.pinned_slots == 0
    request.num_computed_tokens = 0
    assert played.side.matched_tokens(request, 0) == 4 * BLOCK  # preempted
    played.side.finish(request)


# Ends


def test_request_preempted_after_an_async_load_is_matched_again(played: PlayedEngine) -> None:
    request = known_prompt()
    run_another(played)
    played.admit(request, [10, 11, 12, 13], scheduled=False)
    [load] = played.step().loads
    played.ack(load)
    played.side.admit(request, (request.blocks,), 0)
    request.num_computed_tokens = 0
    assert played.admit(request, [20, 21, 22, 23], scheduled=False) == 4 * BLOCK
    [again] = played.step().loads
    assert again.blocks == [20, 21, 22, 23]
    played.ack(again)
    played.side.finish(request)


def test_request_waiting_across_a_reset_stores_nothing(played: PlayedEngine) -> None:
    """The loaded blocks were computed before the reset, maybe with other weights."""
    run_another(played)
    request = known_prompt()
    played.admit(request, [10, 11, 12, 13], scheduled=False)
    [load] = played.step().loads
    played.side.reset()
    played.ack(load)
    request.blocks.append(14)
    played.readmit(request)
    assert not played.step((request, 1)).stores
    assert played.held(request) == [False] * 4
    request.num_computed_tokens = 0  # preempted: all that it computes from now on is sound
    assert played.admit(request, [20, 21, 22, 23, 24], resumed=True) == 0
    [store] = played.step((request, 4 * BLOCK + 1)).stores
    assert store.blocks == [20, 21, 22, 23]
    played.ack(store)
    played.side.finish(request)


def test_request_aborted_during_its_async_load_leaves_nothing(played: PlayedEngine) -> None:
    request = known_prompt()
    runs = run_another(played)
    played.admit(request, [10, 11, 12, 13], scheduled=False)
    [load] = played.step().loads
    played.side.finish(request)
    assert played.side.copying  # ranks read its slots until the load has ended
    assert played.l1.pinned_slots == 4
    played.side.end_step(Acks({load.job: 2}))
    played.side.finish(runs)
    assert played.is_idle()
