"""How leases and jobs of the scheduler's half end: acks, failures, resumes, resets."""

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


def test_finished_while_copies_are_under_way(played: PlayedEngine) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 4 * BLOCK, "same")
    played.admit(request, [4, 5, 6, 7])
    step = played.step((request, 2 * BLOCK))
    played.side.finish(request)
    assert played.l1.pinned_slots == 4
    played.ack(*step.loads, *step.stores)
    assert played.is_idle()
    assert played.held(request) == [True] * 4


def test_a_lease_ends_with_the_last_rank(played: PlayedEngine) -> None:
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
def test_one_rank_that_fails_a_store_fails_it(
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
def test_one_rank_that_fails_a_load_drops_it(
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


def test_a_failed_store_is_offered_again_from_its_place(played: PlayedEngine) -> None:
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


def test_a_failed_load_is_computed_and_offered_again(played: PlayedEngine) -> None:
    played.keep(Request("a", 3 * BLOCK + 1, "same"), [1, 2, 3, 4])
    request = Request("b", 3 * BLOCK + 1, "same")
    played.admit(request, [5, 6, 7, 8])
    step = played.step((request, 1))
    played.ack(*step.loads, *step.stores, failed=True)
    request.num_computed_tokens = 0  # what vLLM makes of it
    [again] = played.step((request, request.num_tokens)).stores
    assert again.blocks == [5, 6, 7]


def test_a_resumed_request_has_other_blocks(played: PlayedEngine) -> None:
    request = Request("a", 3 * BLOCK)
    played.admit(request, [1, 2, 3])
    step = played.step((request, BLOCK))
    played.ack(*step.stores, failed=True)
    request.num_computed_tokens = 0  # preempted
    played.admit(request, [21, 22, 23], resumed=True)
    [store] = played.step((request, 3 * BLOCK)).stores
    assert store.blocks == [21, 22, 23]


def test_a_failure_that_is_known_after_a_resume_changes_nothing(played: PlayedEngine) -> None:
    request = Request("a", 3 * BLOCK)
    played.admit(request, [1, 2, 3])
    [late] = played.step((request, BLOCK)).stores
    request.num_computed_tokens = 0
    played.admit(request, [21, 22, 23], resumed=True)
    [store] = played.step((request, 2 * BLOCK)).stores
    assert store.blocks == [22]  # the first is still being copied, from where it was
    played.ack(late, failed=True)
    played.ack(store)
    played.side.finish(request)
    assert played.held(request) == [False, True, False]
    assert played.is_idle()


# Resets


def test_reset_ends_promises(played: PlayedEngine) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 2 * BLOCK + 1, "same")
    played.side.matched_tokens(request, 0)
    played.side.reset()
    assert played.l1.used_blocks == 0
    assert played.is_idle()
    assert played.admit(request, [4, 5, 6]) == 0


def test_reset_while_a_store_is_under_way(played: PlayedEngine) -> None:
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
def test_reset_while_a_load_is_under_way(played: PlayedEngine, failed: bool) -> None:
    played.keep(Request("a", 2 * BLOCK + 1, "same"), [1, 2, 3])
    request = Request("b", 2 * BLOCK + 1, "same")
    played.admit(request, [4, 5, 6])
    [load] = played.step((request, 1)).loads
    played.side.reset()
    assert played.l1.pinned_slots == 2  # still read
    played.ack(load, failed=failed)
    assert played.held(request) == [False] * 2
    played.side.finish(request)
    assert played.is_idle()


def test_what_runs_on_after_a_reset_is_not_kept(played: PlayedEngine) -> None:
    request = Request("a", 4 * BLOCK)
    played.admit(request, [1, 2, 3, 4])
    played.ack(*played.step((request, BLOCK)).stores)
    played.side.reset()
    assert played.step((request, 3 * BLOCK)).stores == []
    assert played.l1.used_blocks == 0


def test_a_failed_store_from_before_a_reset_is_not_offered_again(played: PlayedEngine) -> None:
    request = Request("a", 4 * BLOCK)
    played.admit(request, [1, 2, 3, 4])
    [store] = played.step((request, BLOCK)).stores
    played.side.reset()
    played.ack(store, failed=True)
    assert played.step((request, 3 * BLOCK)).stores == []
    played.side.finish(request)
    assert played.is_idle()


def test_what_starts_again_after_a_reset_is_kept(played: PlayedEngine) -> None:
    request = Request("a", 2 * BLOCK)
    played.admit(request, [1, 2])
    played.ack(*played.step((request, BLOCK)).stores)
    request.num_computed_tokens = 0  # preempted
    played.side.reset()
    assert played.admit(request, [3, 4], resumed=True) == 0
    [store] = played.step((request, 2 * BLOCK)).stores
    assert store.blocks == [3, 4]


def test_acks_of_ranks_add_up() -> None:
    one, other = {1: 0.5, 2: 0.1}, {1: 0.75, 3: 0.2}
    acks = Acks({1: 1, 2: 1}, {2}, 4, one).aggregate(Acks({1: 1, 3: 1}, {1}, 4, other))
    assert acks.ranks == {1: 2, 2: 1, 3: 1}
    assert acks.seconds == {1: 0.75, 2: 0.1, 3: 0.2}
    assert acks.failed == {1, 2}
