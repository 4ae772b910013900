"""A stack over L1 with blocks of several groups: the resume point, its lease, and stores."""

from collections.abc import Iterator, Sequence

import pytest

from kvcache import Stack
from kvcache.keys import Branch
from kvcache.resume import GroupKeys, Needs
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of
from kvcache.tiers.dram import DramTier

BLOCK_TOKENS = 4


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack(DramTier(block_nbytes=PAGE, capacity=Size(64 * PAGE)), profile="test") as stack:
        yield stack
        assert stack.stats().pinned_slots == 0
        assert isinstance(stack.front, DramTier)
        with stack.front.lock:
            stack.front.index.check()


def key(group: int, block: int, part: int = 0) -> bytes:
    return b"%d/%d/%d" % (group, block, part)


def groups_of(*needs: Needs, parts: int = 1) -> list[GroupKeys]:
    """Return groups with blocks of one size; the first is a chain group."""

    def keys_of(group: int) -> GroupKeys:
        def keys(first: int, end: int) -> list[bytes]:
            return [key(group, block, part) for block in range(first, end) for part in range(parts)]

        rule = needs[group - 1] if group else Needs("all")
        return GroupKeys(rule, BLOCK_TOKENS, parts, keys)

    return [keys_of(group) for group in range(len(needs) + 1)]


def branches(groups: list[GroupKeys], *blocks: int) -> tuple[list[Branch], list[Branch]]:
    """Return the segments that store consecutive blocks: of the chain, and the side blocks."""
    chain, *sides = groups
    first, end = blocks[0], blocks[-1] + 1
    parent = chain.keys(first - 1, first)[-1] if first else None
    return [(chain.keys(first, end), parent)], [
        (side.keys(block, block + 1), chain.keys(block, block + 1)[-1])
        for side in sides
        for block in blocks
    ]


def put(stack: Stack, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> int:
    with stack.reserve_branches(chains, sides) as lease:
        for name, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(name, PAGE)
        return len(lease)


def test_fetch_resume_pins_exactly_the_needed_blocks(stack: Stack) -> None:
    groups = groups_of(Needs("window", 6), Needs("state"), parts=2)
    assert put(stack, *branches(groups, *range(5))) == 5 * 3 * 2
    found = stack.fetch_resume(groups, 0, 19, BLOCK_TOKENS)
    assert found.tokens == 16
    with found.lease as lease:
        chain, window, state = groups
        assert list(lease.keys) == [*chain.keys(0, 4), *window.keys(2, 4), *state.keys(3, 4)]
        assert stack.stats().pinned_slots == len(lease)
        for name, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(name, PAGE)
    found = stack.fetch_resume(groups, 8, 20, BLOCK_TOKENS)
    with found.lease as lease:
        assert found.tokens == 20
        assert list(lease.keys) == [*chain.keys(2, 5), *window.keys(3, 5), *state.keys(4, 5)]


def test_fetch_resume_without_a_side_block_finds_an_earlier_point(stack: Stack) -> None:
    groups = groups_of(Needs("state"))
    put(stack, *branches(groups, *range(5)))
    stack.front.remove([key(1, 4), key(1, 3)])
    with stack.fetch_resume(groups, 0, 20, BLOCK_TOKENS).lease as lease:
        assert list(lease.keys) == [*groups[0].keys(0, 3), key(1, 2)]
    found = stack.fetch_resume(groups, 12, 20, BLOCK_TOKENS)
    assert (found.tokens, len(found.lease)) == (12, 0)
    found.lease.end()


def test_fetch_resume_of_one_chain_group_equals_fetch_local(stack: Stack) -> None:
    [chain] = groups_of()
    put(stack, [(chain.keys(0, 5), None)])
    with stack.fetch_resume([chain], 4, 19, BLOCK_TOKENS).lease as lease:
        assert list(lease.keys) == chain.keys(1, 4)
    with stack.fetch_resume([chain], 4, 20, 3 * BLOCK_TOKENS).lease as lease:
        assert list(lease.keys) == chain.keys(1, 3)
    before = stack.stats().tiers[0]
    assert (before.lookup_blocks, before.hit_blocks) == (3 + 2, 3 + 2)


def test_reserve_branches_lends_no_slot_to_a_side_block_without_its_chain(stack: Stack) -> None:
    groups = groups_of(Needs("state"))
    assert put(stack, [], [([key(1, 7)], key(0, 7))]) == 0
    assert put(stack, *branches(groups, 0, 1)) == 4
    with stack.reserve_branches(*branches(groups, 0, 1, 2)) as lease:
        assert list(lease.positions) == [2, 5]
        assert list(lease.keys) == [key(0, 2), key(1, 2)]
        assert (
            len(stack.reserve_branches([], [([key(1, 2)], key(0, 2))])) == 0
        )  # it is being filled


def test_side_blocks_are_evicted_before_their_chain(stack: Stack) -> None:
    groups = groups_of(Needs("window", 5), Needs("state"))
    put(stack, *branches(groups, *range(8)))
    filler = [b"filler %d" % at for at in range(64 - 24 + 8)]
    put(stack, [(filler, None)])
    assert all(stack.front.contains(groups[0].keys(0, 8)))
    sides = [*groups[1].keys(0, 8), *groups[2].keys(0, 8)]
    assert stack.front.contains(sides).count(False) == 8
