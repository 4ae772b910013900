"""How leases and jobs of the scheduler's side end: acks, failures, resumes, resets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks
from tests.support.played_engine import BLOCK, PlayedEngine, Request, opened

pytestmark = pytest.mark.engine


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    engine = opened(monkeypatch, 32)
    yield engine
    engine.side.close()


def test_request_finished_with_copies_under_way_ends_with_its_acks(played: PlayedEngine) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 4 * BLOCK, "same")
    played.admit(request, [4, 5, 6, 7])
    step = played.step((request, 2 * BLOCK))
    played.side.finish(request)
    assert played.l1.pinned_slots == 4
    played.ack(*step.loads, *step.stores)
    assert played.is_idle()
    assert played.held(request) == [True] * 4


def test_lease_ends_with_the_ack_of_the_last_rank(played: PlayedEngine) -> None:
    request = Request("a", 2 * BLOCK)
    played.admit(request, [1, 2])
    [store] = played.step((request, 2 * BLOCK)).stores
    played.ack(store, ranks=1)
    assert played.held(request) == [False] * 2
    assert played.l1.pinned_slots == 2
    played.ack(store, ranks=1)
    assert played.held(request) == [True] * 2
    assert played.l1.pinned_slots == 0


@pytest.mark.parametrize("failed", [(True, False), (False, True), (True, True)])
def test_store_that_one_rank_fails_is_not_published(
    played: PlayedEngine, failed: tuple[bool, bool]
) -> None:
    request = Request("a", 2 * BLOCK)
    played.admit(request, [1, 2])
    [store] = played.step((request, 2 * BLOCK)).stores
    for outcome in failed:
        played.ack(store, ranks=1, failed=outcome)
    assert played.held(request) == [False] * 2
    assert played.l1.pinned_slots == played.l1.used_blocks == 0


@pytest.mark.parametrize("failed", [(True, False), (False, True), (True, True)])
def test_load_that_one_rank_fails_is_dropped(
    played: PlayedEngine, failed: tuple[bool, bool]
) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 2 * BLOCK + 1, "same")
    played.admit(request, [4, 5, 6])
    [load] = played.step((request, 1)).loads
    for outcome in failed:
        played.ack(load, ranks=1, failed=outcome)
    assert played.held(request) == [False] * 2
    assert played.l1.pinned_slots == played.l1.used_blocks == 0
    assert played.l1.dropped_blocks == 2


def test_failed_store_is_offered_again_from_its_first_block(played: PlayedEngine) -> None:
    request = Request("a", 5 * BLOCK)
    played.admit(request, [1, 2, 3, 4, 5])
    played.ack(*played.step((request, 2 * BLOCK)).stores)
    [failing] = played.step((request, BLOCK)).stores
    assert failing.blocks == [3]
    played.ack(failing, failed=True)
    [again] = played.step((request, BLOCK)).stores
    assert again.blocks == [3, 4]
    played.ack(again)
    assert played.held(request) == [True] * 4 + [False]


def test_failed_load_is_recomputed_and_offered_again(played: PlayedEngine) -> None:
    played.keep(Request("a", 3 * BLOCK + 1, "same"), [1, 2, 3, 4])
    request = Request("b", 3 * BLOCK + 1, "same")
    played.admit(request, [5, 6, 7, 8])
    step = played.step((request, 1))
    played.ack(*step.loads, *step.stores, failed=True)
    request.num_computed_tokens = 0  # as vLLM sets it after a failed load
    [again] = played.step((request, request.num_tokens)).stores
    assert again.blocks == [5, 6, 7]


def test_resumed_request_stores_its_new_blocks(played: PlayedEngine) -> None:
    request = Request("a", 3 * BLOCK)
    played.admit(request, [1, 2, 3])
    step = played.step((request, BLOCK))
    played.ack(*step.stores, failed=True)
    request.num_computed_tokens = 0  # preempted
    played.admit(request, [21, 22, 23], resumed=True)
    [store] = played.step((request, 3 * BLOCK)).stores
    assert store.blocks == [21, 22, 23]


def test_failure_reported_after_a_resume_spoils_no_other_block(played: PlayedEngine) -> None:
    request = Request("a", 3 * BLOCK)
    played.admit(request, [1, 2, 3])
    [late] = played.step((request, BLOCK)).stores
    request.num_computed_tokens = 0
    played.admit(request, [21, 22, 23], resumed=True)
    [store] = played.step((request, 2 * BLOCK)).stores
    assert store.blocks == [22]  # the first one's store is under way, from its old block
    played.ack(late, failed=True)
    played.ack(store)
    played.side.finish(request)
    assert played.held(request) == [False, True, False]
    assert played.is_idle()


# Resets


def test_reset_cancels_pending_loads(played: PlayedEngine) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 2 * BLOCK + 1, "same")
    played.side.matched_tokens(request, 0)
    played.side.reset()
    assert played.l1.used_blocks == 0
    assert played.is_idle()
    assert played.admit(request, [4, 5, 6]) == 0


def test_reset_during_a_store_publishes_nothing(played: PlayedEngine) -> None:
    request = Request("a", 2 * BLOCK)
    played.admit(request, [1, 2])
    [store] = played.step((request, 2 * BLOCK)).stores
    played.ack(store, ranks=1)
    played.side.reset()
    played.ack(store, ranks=1)
    assert played.held(request) == [False] * 2
    played.side.finish(request)
    assert played.is_idle()


@pytest.mark.parametrize("failed", [False, True])
def test_reset_during_a_load_keeps_the_slots_pinned_until_its_acks(
    played: PlayedEngine, failed: bool
) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 2 * BLOCK + 1, "same")
    played.admit(request, [4, 5, 6])
    [load] = played.step((request, 1)).loads
    played.side.reset()
    assert played.l1.pinned_slots == 2  # ranks still read them
    played.ack(load, failed=failed)
    assert played.held(request) == [False] * 2
    played.side.finish(request)
    assert played.is_idle()


def test_request_that_runs_on_after_a_reset_stores_nothing(played: PlayedEngine) -> None:
    request = Request("a", 4 * BLOCK)
    played.admit(request, [1, 2, 3, 4])
    played.ack(*played.step((request, BLOCK)).stores)
    played.side.reset()
    assert played.step((request, 3 * BLOCK)).stores == []
    assert played.l1.used_blocks == 0


def test_store_failed_across_a_reset_is_not_offered_again(played: PlayedEngine) -> None:
    request = Request("a", 4 * BLOCK)
    played.admit(request, [1, 2, 3, 4])
    [store] = played.step((request, BLOCK)).stores
    played.side.reset()
    played.ack(store, failed=True)
    assert played.step((request, 3 * BLOCK)).stores == []
    played.side.finish(request)
    assert played.is_idle()


def test_request_resumed_after_a_reset_stores_its_blocks(played: PlayedEngine) -> None:
    request = Request("a", 2 * BLOCK)
    played.admit(request, [1, 2])
    played.ack(*played.step((request, BLOCK)).stores)
    request.num_computed_tokens = 0  # preempted
    played.side.reset()
    assert played.admit(request, [3, 4], resumed=True) == 0
    [store] = played.step((request, 2 * BLOCK)).stores
    assert store.blocks == [3, 4]


def test_acks_aggregate_adds_ranks_and_takes_the_longest_copy() -> None:
    one, other = {1: 0.5, 2: 0.1}, {1: 0.75, 3: 0.2}
    acks = Acks({1: 1, 2: 1}, {2}, 4, one).aggregate(Acks({1: 1, 3: 1}, {1}, 4, other))
    assert acks.ranks == {1: 2, 2: 1, 3: 1}
    assert acks.seconds == {1: 0.75, 2: 0.1, 3: 0.2}
    assert acks.failed == {1, 2}
