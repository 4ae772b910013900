"""Room that can be made is made, and making it costs what it gives."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.eviction import POLICIES, Take
from kvcache.index import Index

chains = st.text("01", min_size=1, max_size=7)
SLOTS = 9


def chain_of(name: str) -> list[bytes]:
    return [name[: at + 1].encode() for at in range(len(name))]


def room(index: Index, stays: set[bytes]) -> int:
    """Slots that are free, or can be by taking leaves that are neither pinned nor in ``stays``."""
    left = dict(index.ready())
    stood_on = set(index.filling())
    while True:
        parents = {key[:-1] for key in (*left, *stood_on)}
        leaves = [
            key
            for key, slot in left.items()
            if key not in parents and key not in stays and slot not in index._pins
        ]
        if not leaves:
            return len(index._free) + len(index.ready()) - len(left)
        for key in leaves:
            del left[key]


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.tuples(chains, st.booleans(), st.integers(0, 8)), max_size=40),
)
def test_room_that_can_be_made_is_made(name: str, requests: list[tuple[str, bool, int]]) -> None:
    index = Index(POLICIES[name](SLOTS), map(float, itertools.count()).__next__)
    index.open_slots(SLOTS)
    pinned: list[int] = []
    for chain, told, pins in requests:
        names = chain_of(chain)
        found = len(list(itertools.takewhile(index.__contains__, names)))
        if told:
            assert index.access(names, 0) == found
        index.unpin(pinned)
        pinned = index.pin(names[: min(pins, found)])
        absent = names[found:]
        missing = [key for key in absent if key not in index]
        stays = {*absent, *names[found - 1 : found]}
        possible = min(room(index, stays), len(missing))
        _, slots = index.reserve(absent, names[found - 1] if found else None)
        assert len(slots) == possible, (chain, sorted(index.ready()))
        index.publish(slots)


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_kept_for_a_branch_goes_when_the_branch_has(name: str) -> None:
    index = Index(POLICIES[name](4), map(float, itertools.count()).__next__)
    index.open_slots(4)
    index.publish(index.reserve([b"a", b"b", b"c"], None)[1])
    index.publish(index.reserve([b"x"], b"b")[1])
    assert index.reserve([b"1", b"2", b"3", b"4"], None)[0] == [0, 1, 2, 3]


def test_s3fifo_a_used_block_behind_a_pinned_one_can_go() -> None:
    index = Index(POLICIES["s3fifo"](4), map(float, itertools.count()).__next__)
    index.open_slots(4)
    for key in (b"x", b"y", b"s", b"t"):
        index.publish(index.reserve([key], None)[1])
    for key in (b"x", b"y") * 2:
        index.access([key], 0)
    index.publish(index.reserve([b"u"], None)[1])  # x and y pass their probation; s goes
    index.access([b"y"], 0)
    index.pin([b"x"])
    index.pin([b"t"])
    index.pin([b"u"])
    assert index.reserve([b"new"], None)[0] == [0]


@pytest.mark.parametrize("name", POLICIES)
def test_two_answers_that_grow_in_turns_cost_no_more_per_block(name: str) -> None:
    def asked(length: int) -> int:
        policy = POLICIES[name](2 * length)
        index = Index(policy, map(float, itertools.count()).__next__)
        index.open_slots(2 * length)
        count = 0
        a, b = ([b"%s%d" % (who, at) for at in range(length)] for who in (b"a", b"b"))
        for at in range(length):
            for chain in (a, b):
                index.publish(index.reserve([chain[at]], chain[at - 1] if at else None)[1])
        evict = policy.evict

        def counted(some: int, take: Take) -> None:
            def taken(keys: Sequence[bytes]) -> int:
                nonlocal count
                count += 1
                return take(keys)

            evict(some, taken)

        policy.evict = counted  # type: ignore[method-assign, assignment]
        for at in range(length):
            index.publish(index.reserve([b"z%d" % at], None)[1])
        return count

    small, large = asked(200), asked(400)
    assert large <= 2.2 * small
