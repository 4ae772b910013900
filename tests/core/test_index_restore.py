"""An index that is restored at once equals one that got the same stores."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.eviction import POLICIES
from kvcache.index import Index
from kvcache.keys import Branch, branches_of

Stored = list[tuple[bytes, bytes | None]]
"""Keys of blocks with their parents, oldest first."""


@st.composite
def stores(draw: st.DrawFn) -> Stored:
    """Segments of chains that begin anew, continue any earlier block, or continue one not held."""
    blocks: Stored = []
    long_one = draw(st.integers(0, 60))  # a chain of more than one segment in a tenth of the cases
    for number in range(draw(st.integers(1, 10))):
        before = [None, b"not held", *[key for key, _ in blocks]]
        parent = draw(st.sampled_from(before))
        for at in range(300 if number == long_one else draw(st.sampled_from([1, 1, 2, 3, 9]))):
            key = b"%d.%d" % (number, at)
            blocks.append((key, parent))
            parent = key
    return blocks


def index_of(policy: str, slots: int) -> Index:
    return Index(POLICIES[policy](slots), lambda: 0.0)


def stored(policy: str, blocks: Stored, slots: int) -> Index:
    """An index that got the blocks one by one, or by segment for the policy that ranks segments."""
    index = index_of(policy, slots)
    index.open_slots(slots)
    keys, parents = [key for key, _ in blocks], [parent for _, parent in blocks]
    each: list[Branch] = [([key], parent) for key, parent in blocks]
    for branch in branches_of(keys, parents) if policy == "gittins" else each:
        index.publish(index.reserve(*branch)[1])
    return index


def restored(policy: str, blocks: Stored, slots: int) -> Index:
    index = index_of(policy, slots)
    keys, parents = [key for key, _ in blocks], [parent for _, parent in blocks]
    assert index.restore(branches_of(keys, parents), range(len(blocks)), slots)
    return index


def slots_of(index: Index, keys: Sequence[bytes]) -> list[list[int]]:
    found = [index.pin([key]) for key in keys]
    for slots in found:
        index.unpin(slots)
    return found


def eviction_order(index: Index, blocks: Stored) -> list[list[bytes]]:
    """The blocks that leave with each store of a new block."""
    held, order = [key for key, _ in blocks], list[list[bytes]]()
    each = -(-len(blocks) // 30)
    for number in range(len(blocks) // each):
        new = [b"new %d.%d" % (number, at) for at in range(each)]
        index.publish(index.reserve(new, None)[1])
        order.append([key for key in held if key not in index])
        held = [key for key in held if key in index]
    index.check()
    return order


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(blocks=stores(), free=st.integers(0, 3))
def test_restore_equals_the_same_stores(policy: str, blocks: Stored, free: int) -> None:
    keys, slots = [key for key, _ in blocks], len(blocks) + free
    one, other = restored(policy, blocks, slots), stored(policy, blocks, slots)
    one.check()
    assert len(one) == len(other) == len(blocks)
    assert one.ready() == other.ready()
    assert slots_of(one, keys) == slots_of(other, keys)
    assert [one.count_prefix(keys, at) for at in range(len(keys))] == [
        other.count_prefix(keys, at) for at in range(len(keys))
    ]
    assert one.free_slots == other.free_slots == free


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(blocks=stores(), free=st.integers(0, 3))
def test_restore_leads_to_the_evictions_of_the_same_stores(
    policy: str, blocks: Stored, free: int
) -> None:
    slots = len(blocks) + free
    one, other = restored(policy, blocks, slots), stored(policy, blocks, slots)
    assert eviction_order(one, blocks) == eviction_order(other, blocks)


def test_restore_of_a_key_twice_is_refused_and_changes_nothing() -> None:
    index = index_of("lru", 3)
    assert not index.restore([([b"a", b"b"], None), ([b"a"], b"b")], [0, 1, 2], 3)
    index.check()
    assert (len(index), index.slots, b"a" in index) == (0, 0, False)
    assert index.restore([([b"a", b"b"], None)], [0, 2], 3)
    index.check()
    assert index.ready() == {b"a": 0, b"b": 2}
    assert index.reserve([b"c"], b"b") == ([0], [1])


@pytest.mark.parametrize(
    "blocks",
    [
        [(b"a", b"a")],
        [(b"a", b"b"), (b"b", b"a")],
        [(b"a", b"c"), (b"b", b"a"), (b"x", b"b"), (b"c", b"b")],
        [(b"a", b"none"), (b"b", b"d"), (b"e", b"f"), (b"d", b"b"), (b"f", b"a")],
    ],
)
def test_restore_of_a_chain_that_continues_itself_is_refused_and_changes_nothing(
    blocks: Stored,
) -> None:
    index = index_of("lru", len(blocks))
    keys, parents = [key for key, _ in blocks], [parent for _, parent in blocks]
    assert not index.restore(branches_of(keys, parents), range(len(blocks)), len(blocks))
    index.check()
    assert (len(index), index.slots) == (0, 0)


def test_restore_of_parents_after_their_blocks_restores_all() -> None:
    blocks: Stored = [(b"c", b"b"), (b"d", b"c"), (b"y", b"b"), (b"b", b"a"), (b"a", None)]
    index = restored("lru", blocks, len(blocks))
    index.check()
    assert index.count_prefix([b"a", b"b", b"c", b"d"]) == 4
