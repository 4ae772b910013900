"""A stack over L1 with blocks of several groups: the resume point, its lease, and stores."""

from collections.abc import Iterator

import pytest

from kvcache import Stack
from kvcache.eviction import Eviction
from kvcache.resume import Needs
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.tiers.dram import DramTier
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest, check_resume, put_branches

WINDOW, STATE = Needs("window", 6), Needs("state")


@pytest.fixture
def stack() -> Iterator[Stack]:
    front = DramTier(block_nbytes=PAGE, capacity=Size(64 * PAGE), eviction=Eviction("lru"))
    with Stack(front, profile="test") as stack:
        yield stack
        assert stack.stats().pinned_slots == 0
        assert isinstance(stack.front, DramTier)
        with stack.front.lock:
            stack.front.index.check()


@pytest.mark.parametrize("parts", [1, 2])
def test_fetch_resume_pins_exactly_the_needed_blocks(stack: Stack, parts: int) -> None:
    request = GroupedRequest(WINDOW, STATE, parts=parts)
    assert put_branches(stack, *request.branches(0, 5)) == 5 * 3 * parts
    assert check_resume(stack, request, 0, 19) == 16
    assert check_resume(stack, request, 8, 20) == 20
    with stack.fetch_resume(request.groups, 0, 20, BLOCK_TOKENS).lease as lease:
        assert stack.stats().pinned_slots == len(lease) == (5 + 2 + 1) * parts


def test_fetch_resume_without_a_side_block_finds_an_earlier_point(stack: Stack) -> None:
    request = GroupedRequest(STATE)
    put_branches(stack, *request.branches(0, 5))
    stack.front.remove([request.key(1, 4), request.key(1, 3)])
    assert check_resume(stack, request, 0, 20) == 12
    assert check_resume(stack, request, 12, 20) == 12


def test_fetch_resume_without_a_chain_group_finds_side_blocks(stack: Stack) -> None:
    request = GroupedRequest(WINDOW, chain=False)
    put_branches(stack, *request.branches(0, 5))
    assert check_resume(stack, request, 0, 19) == 16
    stack.front.remove([request.key(0, 3)])
    assert check_resume(stack, request, 0, 20) == 12


def test_fetch_resume_of_one_chain_group_equals_fetch_local(stack: Stack) -> None:
    request = GroupedRequest()
    put_branches(stack, *request.branches(0, 5))
    assert check_resume(stack, request, 4, 19) == 16
    assert check_resume(stack, request, 4, 20, 3 * BLOCK_TOKENS) == 12
    stats = stack.stats().tiers[0]
    assert (stats.lookup_blocks, stats.hit_blocks) == (3 + 2, 3 + 2)


def test_reserve_branches_lends_no_slot_to_a_side_block_without_its_chain(stack: Stack) -> None:
    request = GroupedRequest(STATE)
    assert put_branches(stack, [], [([request.key(1, 7)], request.key(0, 7))]) == 0
    assert put_branches(stack, *request.branches(0, 2)) == 4
    with stack.reserve_branches(*request.branches(0, 3)) as lease:
        assert list(lease.positions) == [2, 5]
        assert list(lease.keys) == [request.key(0, 2), request.key(1, 2)]
        # A block that is being filled is a parent, and is not lent again.
        _, sides = request.branches(2, 3)
        assert len(stack.reserve_branches([], sides)) == 0


def test_side_blocks_are_evicted_before_their_chain(stack: Stack) -> None:
    request = GroupedRequest(WINDOW, STATE)
    put_branches(stack, *request.branches(0, 8))
    other = GroupedRequest(name="other")
    put_branches(stack, *other.branches(0, 64 - 24 + 8))
    chain, *sides = request.groups
    assert all(stack.front.contains(chain.keys(0, 8)))
    held = stack.front.contains([key for side in sides for key in side.keys(0, 8)])
    assert held.count(False) == 8


def test_fetch_resume_reports_the_tokens_of_the_chain(stack: Stack) -> None:
    request = GroupedRequest(STATE)
    put_branches(stack, *request.branches(0, 5, kept=[1]))
    with stack.fetch_resume(request.groups, 0, 19, BLOCK_TOKENS).lease as lease:
        assert len(lease) == 3
    for own, tokens, chain_tokens in [(0, 8, 16), (8, 8, 16), (16, 16, 16)]:
        found = stack.fetch_resume(request.groups, own, 19, BLOCK_TOKENS)
        found.lease.end()
        assert (found.tokens, found.chain_tokens) == (tokens, chain_tokens)


def test_hint_done_evicts_the_blocks_of_all_groups_first(stack: Stack) -> None:
    done, other = GroupedRequest(WINDOW, name="done"), GroupedRequest(WINDOW, name="other")
    put_branches(stack, *other.branches(0, 16))
    put_branches(stack, *done.branches(0, 16))
    stack.hint_resume(done.groups, 16 * BLOCK_TOKENS, done=True)
    put_branches(stack, *GroupedRequest(name="new").branches(0, 32))
    assert check_resume(stack, other, 0, 16 * BLOCK_TOKENS) == 16 * BLOCK_TOKENS
    assert not any(stack.front.contains([k for group in done.groups for k in group.keys(0, 16)]))


def test_hint_keep_protects_what_the_last_resume_point_needs(stack: Stack) -> None:
    kept = GroupedRequest(WINDOW, name="kept")
    put_branches(stack, *kept.branches(0, 10))
    stack.hint_resume(kept.groups, 10 * BLOCK_TOKENS + 1, keep=60.0)
    put_branches(stack, *GroupedRequest(name="new").branches(0, 64 - 12))
    assert check_resume(stack, kept, 0, 10 * BLOCK_TOKENS) == 10 * BLOCK_TOKENS
    window = kept.groups[1]
    assert stack.front.contains(window.keys(0, 10)) == [False] * 8 + [True] * 2


def test_interior_side_blocks_are_evicted_before_those_of_the_last_hit(stack: Stack) -> None:
    request = GroupedRequest(WINDOW, STATE)
    put_branches(stack, *request.branches(0, 16))
    assert check_resume(stack, request, 0, 16 * BLOCK_TOKENS) == 16 * BLOCK_TOKENS
    # 48 of 64 slots are used; 2 blocks of the window and 1 state are needed for the next hit.
    put_branches(stack, *GroupedRequest(name="new").branches(0, 16 + 14 + 15))
    assert check_resume(stack, request, 0, 16 * BLOCK_TOKENS) == 16 * BLOCK_TOKENS
    window, state = request.groups[1:]
    assert stack.front.contains(window.keys(0, 16)) == [False] * 14 + [True] * 2
    assert stack.front.contains(state.keys(0, 16)) == [False] * 15 + [True]
