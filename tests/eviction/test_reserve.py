"""``Index.reserve`` evicts whatever may be evicted, at a bounded cost, under every policy."""

import itertools
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.eviction import POLICIES, Take
from kvcache.index import Index

chains = st.text("01", min_size=1, max_size=7)
SLOTS = 9


def chain_of(name: str) -> list[bytes]:
    return [name[: at + 1].encode() for at in range(len(name))]


def reservable(index: Index, protected: set[bytes], pinned: Collection[int]) -> int:
    """Count the slots that are free, or become free by evicting leaves again and again.

    ``protected`` keys and ``pinned`` slots are not evicted.
    """
    remaining = dict(index.ready())
    filling = set(index.filling())
    while True:
        parents = {key[:-1] for key in (*remaining, *filling)}
        leaves = [
            key
            for key, slot in remaining.items()
            if key not in parents and key not in protected and slot not in pinned
        ]
        if not leaves:
            return index.free_slots + len(index.ready()) - len(remaining)
        for key in leaves:
            del remaining[key]


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.tuples(chains, st.booleans(), st.integers(0, 8)), max_size=40),
)
def test_reserve_evicts_as_much_as_it_can(name: str, requests: list[tuple[str, bool, int]]) -> None:
    index = Index(POLICIES[name](SLOTS), map(float, itertools.count()).__next__)
    index.open_slots(SLOTS)
    pinned: list[int] = []
    for chain, access, pins in requests:
        keys = chain_of(chain)
        found = len(list(itertools.takewhile(index.__contains__, keys)))
        if access:
            assert index.access(keys, 0) == found
        index.unpin(pinned)
        pinned = index.pin(keys[: min(pins, found)])
        absent = keys[found:]
        missing = [key for key in absent if key not in index]
        protected = {*absent, *keys[found - 1 : found]}
        possible = min(reservable(index, protected, pinned), len(missing))
        _, slots = index.reserve(absent, keys[found - 1] if found else None)
        assert len(slots) == possible, (chain, sorted(index.ready()))
        index.publish(slots)


@pytest.mark.parametrize("name", POLICIES)
def test_reserve_after_a_branch_was_evicted_evicts_its_stem(name: str) -> None:
    index = Index(POLICIES[name](4), map(float, itertools.count()).__next__)
    index.open_slots(4)
    index.publish(index.reserve([b"a", b"b", b"c"], None)[1])
    index.publish(index.reserve([b"x"], b"b")[1])
    assert index.reserve([b"1", b"2", b"3", b"4"], None)[0] == [0, 1, 2, 3]


def test_s3fifo_used_block_behind_a_pinned_one_is_evicted() -> None:
    index = Index(POLICIES["s3fifo"](4), map(float, itertools.count()).__next__)
    index.open_slots(4)
    for key in (b"x", b"y", b"s", b"t"):
        index.publish(index.reserve([key], None)[1])
    for key in (b"x", b"y") * 2:
        index.access([key], 0)
    index.publish(index.reserve([b"u"], None)[1])  # x and y move to the main queue; s is evicted
    index.access([b"y"], 0)
    index.pin([b"x"])
    index.pin([b"t"])
    index.pin([b"u"])
    assert index.reserve([b"new"], None)[0] == [0]


@pytest.mark.parametrize("name", POLICIES)
def test_evict_chains_that_grew_in_turns_costs_the_same_per_block(name: str) -> None:
    def count_takes(length: int) -> int:
        policy = POLICIES[name](2 * length)
        index = Index(policy, map(float, itertools.count()).__next__)
        index.open_slots(2 * length)
        count = 0
        a, b = ([b"%s%d" % (chain, at) for at in range(length)] for chain in (b"a", b"b"))
        for at in range(length):
            for chain in (a, b):
                index.publish(index.reserve([chain[at]], chain[at - 1] if at else None)[1])
        evict = policy.evict

        def counting_evict(blocks: int, take: Take) -> None:
            def counting_take(keys: Sequence[bytes]) -> int:
                nonlocal count
                count += 1
                return take(keys)

            evict(blocks, counting_take)

        policy.evict = counting_evict  # type: ignore[method-assign, assignment]
        for at in range(length):
            index.publish(index.reserve([b"z%d" % at], None)[1])
        return count

    small, large = count_takes(200), count_takes(400)
    assert large <= 2.2 * small


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(
    "stores", [[(b"a", b"a")], [(b"a", b"b"), (b"b", b"a")]], ids=["one-block", "two-blocks"]
)
def test_reserve_after_a_chain_that_continues_itself_evicts_the_other_blocks(
    policy: str, stores: list[tuple[bytes, bytes]]
) -> None:
    index = Index(POLICIES[policy](6), lambda: 0.0)
    index.open_slots(6)
    for key, parent in stores:
        index.publish(index.reserve([key], parent)[1])
    for number in range(30):
        _, slots = index.reserve([b"new %d" % number], None)
        assert len(slots) == 1
        index.publish(slots)
        index.check()
