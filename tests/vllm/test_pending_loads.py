"""When a hit comes with the step, and when later; and what a request that waited brings back."""

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
    engine.keep(known("loads", 1), [0, 1], load_s=0.004)
    yield engine
    engine.side.close()


def known(name: str = "asks", blocks: int = 4) -> Request:
    return Request(name, blocks * BLOCK + 1, name="known")


def others(played: PlayedEngine) -> Request:
    runs = Request("runs", 10)
    played.admit(runs, [9])
    played.step((runs, 10))
    return runs


def test_a_long_load_comes_later_where_others_run(played: PlayedEngine) -> None:
    request = known()
    others(played)
    assert played.admit(request, [10, 11, 12, 13], scheduled=False) == 4 * BLOCK
    step = played.step()
    [load] = step.loads
    assert (load.blocks, load.awaited_by) == ([10, 11, 12, 13], "asks")
    played.ack(load)
    # It is over: vLLM takes the request, with the tokens that it has now.
    request.blocks.append(14)
    played.readmit(request)
    step = played.step((request, 1))
    assert not step.loads
    assert not step.stores  # all is held
    played.side.finish(request)
    assert not played.side.copying


@pytest.mark.parametrize("why", ["alone", "short", "in the step"])
def test_other_loads_come_with_the_step(
    played: PlayedEngine, in_step: PlayedEngine, why: str
) -> None:
    played = in_step if why == "in the step" else played
    if why != "alone":
        others(played)
    request = known(blocks=1 if why == "short" else 4)
    assert played.side.matched_tokens(request, 0)
    assert not played.side.is_async(request)
    played.side.finish(request)


# All there is


def whole(blocks: int = 4, name: str = "known") -> Request:
    return Request("whole", blocks * BLOCK, name=name)


def test_what_comes_later_may_be_the_whole_prompt(played: PlayedEngine) -> None:
    request = whole()
    others(played)
    assert played.admit(request, [10, 11, 12, 13], scheduled=False) == 4 * BLOCK
    assert played.side.is_async(request) is False  # vLLM has taken it
    assert played.l1.pinned_slots == 4
    [load] = played.step().loads
    assert (load.blocks, load.awaited_by) == ([10, 11, 12, 13], "whole")
    played.ack(load)
    # vLLM has the last token computed anew, in a block that it has.
    request.num_computed_tokens -= 1
    played.readmit(request)
    step = played.step((request, 1))
    assert not step.loads
    assert not step.stores
    assert {10, 11, 12, 13} <= set(step.fresh)  # the engine writes there: no copy may read it
    played.side.finish(request)
    assert played.l1.pinned_slots == 0


@pytest.mark.parametrize("why", ["alone", "short", "in the step"])
def test_what_comes_with_the_step_leaves_a_token(
    played: PlayedEngine, in_step: PlayedEngine, why: str
) -> None:
    played = in_step if why == "in the step" else played
    if why != "alone":
        others(played)
    request = whole(1 if why == "short" else 4)
    tokens = played.side.matched_tokens(request, 0)
    assert tokens == request.num_tokens - BLOCK
    assert not played.side.is_async(request)
    assert played.l1.pinned_slots == tokens // BLOCK
    played.side.finish(request)


def test_all_would_come_later_but_there_is_less(played: PlayedEngine) -> None:
    played.keep(Request("first", BLOCK + 1, name="half"), [20, 21])
    others(played)
    request = whole(2, "half")
    assert played.side.matched_tokens(request, 0) == BLOCK
    assert not played.side.is_async(request)
    played.side.finish(request)


def test_beyond_what_the_engine_has_it_may_be_all(played: PlayedEngine) -> None:
    others(played)
    request = whole()
    assert played.side.matched_tokens(request, 2 * BLOCK) == 2 * BLOCK  # 8 ms
    assert played.side.is_async(request)
    assert played.side.matched_tokens(request, 3 * BLOCK) == 0  # 4 ms
    played.side.finish(request)
    assert played.l1.pinned_slots == 0


def test_all_of_a_request_that_goes_on_may_come_later(played: PlayedEngine) -> None:
    others(played)
    request = whole()
    request.num_prompt_tokens = 2 * BLOCK + 5  # the rest it had generated when it was preempted
    assert played.admit(request, [10, 11, 12, 13], scheduled=False) == 4 * BLOCK
    [load] = played.step().loads
    played.ack(load)
    played.side.finish(request)
    assert played.l1.pinned_slots == 0


def test_of_a_load_of_all_that_fails_nothing_is_promised_again(played: PlayedEngine) -> None:
    others(played)
    request = whole()
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


def test_nothing_is_awaited_of_who_was_promised_all_and_took_nothing(played: PlayedEngine) -> None:
    others(played)
    request = whole()
    assert played.side.matched_tokens(request, 0) == 4 * BLOCK
    request.blocks = [10, 11, 12, 13]
    played.readmit(request)
    assert not played.step((request, 4 * BLOCK)).loads
    assert played.l1.pinned_slots == 0
    request.num_computed_tokens = 0
    assert played.side.matched_tokens(request, 0) == 4 * BLOCK  # it was preempted
    played.side.finish(request)


# Ends


def test_who_is_preempted_after_a_load_is_looked_up_again(played: PlayedEngine) -> None:
    request = known()
    others(played)
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


def test_of_who_waited_through_a_reset_nothing_is_kept(played: PlayedEngine) -> None:
    """What it has loaded was computed before, by other weights perhaps."""
    others(played)
    request = known()
    played.admit(request, [10, 11, 12, 13], scheduled=False)
    [load] = played.step().loads
    played.side.reset()
    played.ack(load)
    request.blocks.append(14)
    played.readmit(request)
    assert not played.step((request, 1)).stores
    assert played.held(request) == [False] * 4
    request.num_computed_tokens = 0  # preempted: what it computes from now on is new
    assert played.admit(request, [20, 21, 22, 23, 24], resumed=True) == 0
    [store] = played.step((request, 4 * BLOCK + 1)).stores
    assert store.blocks == [20, 21, 22, 23]
    played.ack(store)
    played.side.finish(request)


def test_one_that_is_gone_leaves_nothing(played: PlayedEngine) -> None:
    request = known()
    runs = others(played)
    played.admit(request, [10, 11, 12, 13], scheduled=False)
    [load] = played.step().loads
    played.side.finish(request)
    assert played.side.copying  # its slots are read until the load is over
    assert played.l1.pinned_slots == 4
    played.side.end_step(Acks({load.job: 2}))
    played.side.finish(runs)
    assert played.is_idle()
