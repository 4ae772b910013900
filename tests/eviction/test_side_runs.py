"""Side blocks under the learned policy: windows and states beside a chain."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.eviction import POLICIES, Gittins
from kvcache.eviction.gittins.hazards import EXTENSION, NEW, OCTAVE_COUNT, SIDE, SIDE_USED
from kvcache.eviction.gittins.lru_budget import LruBudget
from kvcache.index import Index
from kvcache.testing import evict_blocks
from kvcache.testing.policy import store_with_sides

chains = st.text("01", min_size=1, max_size=6)
pauses = st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0, 1e6])


def prefixes(name: str) -> list[bytes]:
    return [name[: at + 1].encode() for at in range(len(name))]


def policy_of(capacity: int, **options: Any) -> Gittins:
    """Return a policy of an index that stores side blocks."""
    policy = Gittins(capacity, **options)
    policy.expect_sides()
    return policy


def side_of(key: bytes, parts: int = 1) -> list[bytes]:
    return [b"%s.%d" % (key, part) for part in range(parts)]


def store(
    index: Index, chain: Sequence[bytes], first: int, sides: Sequence[int], parts: int
) -> None:
    """Store ``chain[first:]`` and the side blocks at these positions."""
    parent = chain[first - 1] if first else None
    branches = [(side_of(chain[at], parts), chain[at]) for at in sides]
    store_with_sides(index, chain[first:], parent, branches)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(1, 3),
    st.lists(st.tuples(chains, st.integers(0, 9), st.integers(1, 4), pauses), max_size=50),
)
def test_gittins_with_side_blocks_keeps_its_invariants(
    history: int, parts: int, requests: list[tuple[str, int, int, float]]
) -> None:
    now = 0.0
    policy = policy_of(12, known_limit=12 + history)
    index = Index(policy, lambda: now)
    index.open_slots(12)
    for name, action, step, pause in requests:
        now += pause
        chain = prefixes(name)
        held = index.count_prefix(chain)
        resume = next(
            (
                at
                for at in range(held, 0, -1)
                if all(key in index for key in side_of(chain[at - 1], parts))
            ),
            0,
        )
        for _ in range(1 + (action == 7)):  # a request may have to wait
            if resume and action != 6:
                index.access(side_of(chain[resume - 1], parts), 0)
            index.access(chain, 0)
            policy.check(index.ready())
        pinned = index.pin(chain[: min(action, held)])
        for at in range(resume, len(chain), step):
            end = min(len(chain), at + step)
            now += 0.05
            store(index, chain[:end], at, range(at, end) if action % 2 else [end - 1], parts)
            policy.check(index.ready())
        index.unpin(pinned)
        if action == 8:
            index.drop([key for key in (*side_of(chain[-1], parts), chain[0]) if key in index])
        if action == 9:
            index.clear()
        policy.check(index.ready())
        index.check()


@pytest.mark.parametrize("name", POLICIES)
def test_reserve_with_side_blocks_evicts_all_that_is_not_in_use(name: str) -> None:
    index = Index(POLICIES[name](12), map(float, itertools.count()).__next__)
    index.open_slots(12)
    for chain in (prefixes("abc"), prefixes("xyz")):
        index.access(chain, 0)
        store(index, chain, 0, range(3), 1)
    index.access(side_of(b"abc"), 0)
    index.access(prefixes("abc"), 0)
    assert index.reserve(prefixes("123456789012"), None)[0] == list(range(12))


def test_reserve_without_room_for_all_blocks_stores_the_last_side_blocks() -> None:
    index = Index(POLICIES["lru"](5), map(float, itertools.count()).__next__)
    index.open_slots(5)
    chain = prefixes("abc")
    store(index, chain, 0, range(3), 1)
    assert set(index.ready()) == {*chain, *side_of(b"ab"), *side_of(b"abc")}


def gittins_with_two_conversations() -> tuple[Gittins, list[bytes], list[bytes]]:
    """Both have the side blocks of three chain blocks; each was resumed at its end."""
    policy = policy_of(3200, budget=LruBudget(3200, stake=1e9))
    old, new = prefixes("abc"), prefixes("xyz")
    policy.last_blocks.separate = False
    for now, chain in ((0.0, old), (100.0, new)):
        policy.access(chain, 0, now)
        for key in chain:
            policy.add(side_of(key), key, now)
        policy.add(chain, None, now)
        policy.access(side_of(chain[-1]), 1, now + 10)
        policy.access(chain, 3, now + 10)
    return policy, old, new


def order(policy: Gittins, *chains: Sequence[bytes]) -> list[bytes]:
    """Evict all blocks; a chain block stays as long as a block below it stays."""
    below = {
        key: [*side_of(key), *chain[at + 1 : at + 2]]
        for chain in chains
        for at, key in enumerate(chain)
    }
    gone: list[bytes] = []

    def pinned(key: bytes) -> bool:
        if any(child not in gone for child in below.get(key, ())):
            return True
        gone.append(key)
        return False

    evict_blocks(policy, pinned=pinned)
    return gone


def test_gittins_unused_side_blocks_leave_first_and_conversations_in_order() -> None:
    policy, old, new = gittins_with_two_conversations()
    for octave in range(OCTAVE_COUNT):  # learns that they are never used
        policy.hazards.add_at_risk(SIDE, octave, octave, 100_000)
    policy.hazards.learn()
    policy.sort_queues()
    interior = [*side_of(old[0]), *side_of(old[1]), *side_of(new[0]), *side_of(new[1])]
    evicted = order(policy, old, new)
    assert sorted(evicted[:4]) == sorted(interior)
    assert evicted[4:] == [*side_of(old[2]), *old[::-1], *side_of(new[2]), *new[::-1]]
    policy.check([])


def test_gittins_side_blocks_are_no_new_chains() -> None:
    policy, chain = policy_of(3200), prefixes("abcd")
    policy.access(chain, 0, 0.0)
    for key in chain:
        policy.add(side_of(key), key, 0.0)
    policy.add(chain, None, 0.0)
    policy.add(side_of(b"abcde"), b"abcde", 1.0)  # generated
    policy.add([b"abcde"], b"abcd", 1.0)
    begun = policy.hazards.begun
    assert (begun[SIDE], begun[SIDE_USED]) == (5, 0)
    assert begun[NEW] + begun[EXTENSION] <= 5
    policy.access(side_of(b"abcde"), 1, 2.0)
    assert begun[SIDE_USED] == 1


def test_gittins_repeated_lookup_of_side_blocks_is_one_use() -> None:
    policy, chain = policy_of(3200), prefixes("ab")
    policy.access(chain, 0, 0.0)
    policy.add(side_of(b"ab"), b"ab", 0.0)
    policy.add(chain, None, 0.0)
    for now in range(1, 9):
        policy.access(side_of(b"ab"), 1, float(now))
        policy.access(chain, 2, float(now))
    assert {run.uses for run in policy.runs.values()} == {2}
    policy.check([*side_of(b"ab"), *chain])


def test_gittins_side_block_stored_again_is_no_use() -> None:
    policy, chain = policy_of(3200), prefixes("ab")
    policy.access(chain, 0, 0.0)
    policy.add(side_of(b"ab", 3), b"ab", 0.0)
    policy.add(chain, None, 0.0)
    evict_blocks(policy, 2, pinned=set(chain).__contains__)
    policy.add(side_of(b"ab", 3)[1:], side_of(b"ab")[0], 50.0)
    assert policy.hazards.reused[SIDE] == [0.0] * len(policy.hazards.reused[SIDE])
    policy.check([*side_of(b"ab", 3), *chain])


def test_gittins_learns_the_window_from_lookups() -> None:
    policy, chain = policy_of(3200), prefixes("abcdefgh")
    policy.access(chain, 0, 0.0)
    for key in chain:
        policy.add(side_of(key), key, 0.0)
    policy.add(chain, None, 0.0)
    policy.access([*side_of(chain[6]), *side_of(chain[7])], 2, 1.0)
    policy.access(chain, 8, 1.0)
    assert policy.window == 2


def test_gittins_of_an_index_without_side_blocks_takes_no_block_for_one() -> None:
    plain, learned = Gittins(8), policy_of(8)
    for policy in (plain, learned):
        policy.add([b"b"], b"a", 0.0)  # the block that it continues is not held
    assert (plain.side_ids, len(learned.side_ids)) == ({}, 1)
