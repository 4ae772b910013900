"""The order in which each policy evicts, and that its keys are those that the index holds."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.eviction import POLICIES, AibrixS3Fifo, Fifo, Lru, Policy, S3Fifo
from kvcache.eviction.runs import RunPolicy
from kvcache.index import Index
from kvcache.testing import evict_blocks


def keys(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def add(policy: Policy, names: str, parent: str | None = None) -> None:
    policy.add(keys(names), parent.encode() if parent else None, 0.0)


def order(policy: Policy, pinned: Callable[[bytes], bool] = lambda _: False) -> str:
    return b"".join(evict_blocks(policy, pinned=pinned)).decode()


def test_fifo_evicts_the_oldest_chain_from_its_tail() -> None:
    policy = Fifo(9)
    add(policy, "abc")
    add(policy, "xy")
    policy.access(keys("abc"), 3, 1.0)
    assert order(policy) == "cbayx"


def test_lru_evicts_the_least_recently_used_chain() -> None:
    policy = Lru(9)
    add(policy, "abc")
    add(policy, "xy")
    policy.access(keys("ab"), 2, 1.0)
    assert order(policy) == "cyxba"


def test_lru_added_continuation_makes_its_chain_the_newest() -> None:
    policy = Lru(9)
    add(policy, "ab")
    add(policy, "x")
    add(policy, "c", parent="b")
    assert order(policy) == "xcba"


def test_lru_shared_head_is_evicted_last() -> None:
    policy = Lru(9)
    add(policy, "hab")
    add(policy, "xy", parent="h")
    policy.access(keys("hxy"), 3, 1.0)
    assert order(policy) == "bayxh"


def test_lru_block_used_without_its_ancestors_is_the_newest() -> None:
    policy = Lru(9)
    add(policy, "abc")
    policy.access(keys("b"), 1, 1.0)
    assert order(policy) == "cab"


def test_lru_access_touches_only_held_blocks() -> None:
    policy = Lru(9)
    add(policy, "abc")
    add(policy, "x")
    policy.access(keys("abcd"), 1, 1.0)
    assert order(policy) == "cbxa"


def test_lru_run_continued_by_a_newer_run_is_evicted_right_after_that() -> None:
    """`1` and `2` are side blocks of `a` and `b`, stored after them as a lower tier does."""
    policy = Lru(9)
    add(policy, "abc")
    add(policy, "1", parent="a")
    add(policy, "2", parent="b")
    add(policy, "xy")
    below = {"a": "b1", "b": "c2"}
    gone = set[bytes]()

    def pinned(key: bytes) -> bool:
        children = keys(below.get(key.decode(), ""))
        if any(child not in gone for child in children):
            return True
        gone.add(key)
        return False

    assert order(policy, pinned) == "c12bayx"


def test_lru_side_blocks_reported_before_their_chain_are_evicted_before_it() -> None:
    policy = Lru(9)
    add(policy, "1", parent="a")
    add(policy, "2", parent="b")
    add(policy, "ab")
    add(policy, "3", parent="x")
    add(policy, "x")
    policy.access(keys("2"), 1, 1.0)
    policy.access(keys("ab"), 2, 1.0)
    assert order(policy) == "13x2ba"


def test_s3fifo_blocks_used_once_are_evicted_before_reused_ones() -> None:
    policy = S3Fifo(10, small=0.3)
    add(policy, "ab")
    for _ in range(2):
        policy.access(keys("ab"), 2, 1.0)
    for name in "stuvwxyz":
        add(policy, name)
    assert order(policy).startswith("stuvwxyz"[:5])
    policy = S3Fifo(10, small=0.3)
    add(policy, "ab")
    for name in "stuvwxyz":
        add(policy, name)
    assert order(policy).startswith("bast")


def test_s3fifo_reused_head_of_a_chain_is_evicted_last() -> None:
    policy = S3Fifo(4, small=0.5)
    add(policy, "abcd")
    for _ in range(2):
        policy.access(keys("ab"), 2, 1.0)
    assert order(policy)[:2] == "dc"


def test_s3fifo_ghost_that_is_added_again_enters_the_main_queue() -> None:
    policy = S3Fifo(4, small=0.5)
    add(policy, "ab")
    assert order(policy) == "ba"
    add(policy, "ax")
    add(policy, "vw")
    assert evict_blocks(policy, 1) == [b"x"]  # unlike `a`, it was no ghost
    assert policy.run_of[b"a"].queue is policy.main


def test_s3fifo_ghosts_are_at_most_the_capacity() -> None:
    policy = S3Fifo(5, small=0.5)
    for at in range(100):
        policy.add([b"%d" % at], None, 0.0)
        evict_blocks(policy, 1)
    assert len(policy.ghosts) == 5


def test_s3fifo_eviction_from_main_adds_no_ghost() -> None:
    policy = S3Fifo(4, small=0.25)
    add(policy, "a")
    add(policy, "b")
    for _ in range(2):
        policy.access(keys("a"), 1, 1.0)
    assert order(policy) == "ba"
    assert set(policy.ghosts) == {b"b"}


def test_s3fifo_removed_and_evicted_blocks_have_no_uses() -> None:
    policy = S3Fifo(4)
    add(policy, "ab")
    policy.access(keys("abc"), 3, 1.0)  # the policy does not hold `c`
    assert set(policy.uses) == {b"a", b"b"}
    policy.remove(keys("b"))
    assert set(policy.uses) == {b"a"}
    assert order(policy) == "a"
    assert policy.uses == {}


def test_aibrix_s3fifo_one_use_promotes_to_main() -> None:
    for cls, first in ((S3Fifo, "b"), (AibrixS3Fifo, "y")):
        policy = cls(4)
        add(policy, "ab")
        policy.access(keys("ab"), 2, 1.0)
        add(policy, "xy")
        assert order(policy)[0] == first


def in_main(names: str, small: float = 0.5) -> S3Fifo:
    """Return a policy that has these blocks in its main queue, without uses."""
    policy = S3Fifo(8, small)
    for name in names:
        add(policy, name)
    order(policy)  # makes all of them ghosts
    for name in names:
        add(policy, name)
    assert policy.main.blocks == len(names)
    return policy


def test_s3fifo_main_keeps_used_blocks_for_another_round() -> None:
    policy = in_main("xyz")
    policy.access(keys("x"), 1, 2.0)
    assert order(policy) == "yzx"


def test_s3fifo_evicts_from_main_while_small_is_below_its_share() -> None:
    policy = in_main("xyz", small=0.25)
    add(policy, "a")
    assert evict_blocks(policy, 1) == [b"x"]
    add(policy, "b")
    assert evict_blocks(policy, 1) == [b"a"]


def test_s3fifo_evicts_from_main_when_small_is_pinned() -> None:
    policy = in_main("xyz", small=0.25)
    add(policy, "a")
    add(policy, "b")
    assert order(policy, pinned=lambda key: key in b"ab") == "xyz"


def test_lru_rest_of_a_cut_run_has_the_right_parent() -> None:
    policy = Lru(9)
    add(policy, "abc")
    policy.access(keys("ab"), 2, 1.0)
    assert policy.run_of[b"c"].parent == b"b"


@pytest.mark.parametrize("policy", POLICIES.values())
def test_policy_pinned_block_protects_its_ancestors(policy: type[Policy]) -> None:
    instance = policy(9)
    add(instance, "abc")
    add(instance, "xyz")
    assert order(instance, pinned=lambda key: key == b"b") == "czyx"
    assert sorted(order(instance)) == ["a", "b"]


@pytest.mark.parametrize("policy", POLICIES.values())
def test_policy_all_blocks_pinned_evicts_none(policy: type[Policy]) -> None:
    instance = policy(9)
    add(instance, "abc")
    add(instance, "xyz")
    instance.access(keys("xyz"), 3, 1.0)
    assert order(instance, pinned=lambda _: True) == ""
    assert sorted(order(instance)) == list("abcxyz")


@pytest.mark.parametrize("policy", POLICIES.values())
def test_policy_partial_eviction_forgets_only_evicted_blocks(policy: type[Policy]) -> None:
    instance = policy(9)
    add(instance, "abc")
    add(instance, "xyz")
    some = b"".join(evict_blocks(instance, 2)).decode()
    assert sorted(some + order(instance)) == list("abcxyz")


@pytest.mark.parametrize("policy", POLICIES.values())
def test_policy_removed_keys_are_not_evicted(policy: type[Policy]) -> None:
    instance = policy(9)
    add(instance, "abc")
    add(instance, "xy")
    instance.remove(keys("bx"))
    assert sorted(order(instance)) == ["a", "c", "y"]


@pytest.mark.parametrize("name", POLICIES)
def test_policy_chain_grown_block_by_block_is_evicted_in_linear_time(name: str) -> None:
    """The number of offered blocks is linear in the length of the chain."""

    def pinned_calls(length: int) -> int:
        policy, count, children = POLICIES[name](2 * length), 0, set[bytes]()
        names = [b"%d" % at for at in range(length)]
        for at, key in enumerate(names):
            policy.add([key], names[at - 1] if at else None, 0.0)
        children.update(names[:-1])

        def pinned(key: bytes) -> bool:
            nonlocal count
            count += 1
            return key in children

        for at in range(length):
            [victim] = evict_blocks(policy, 1, pinned)
            assert victim == names[length - 1 - at]
            if at + 1 < length:
                children.remove(names[length - 2 - at])
        return count

    assert pinned_calls(400) <= 2.2 * pinned_calls(200)


chains = st.text("01", min_size=1, max_size=8)


@given(
    st.sampled_from(sorted(name for name, cls in POLICIES.items() if issubclass(cls, RunPolicy))),
    st.lists(st.tuples(chains, st.integers(0, 8)), max_size=60),
)
def test_run_policy_under_random_requests_matches_the_index(
    name: str, requests: list[tuple[str, int]]
) -> None:
    policy = POLICIES[name](8)
    assert isinstance(policy, RunPolicy)
    index = Index(policy, map(float, itertools.count()).__next__)
    index.open_slots(8)
    for chain, pinned in requests:
        names = [chain[: at + 1].encode() for at in range(len(chain))]
        found = index.access(names, 0)
        slots = index.pin(names[: min(pinned, found)])
        index.publish(index.reserve(names[found:], names[found - 1] if found else None)[1])
        index.unpin(slots)
        if pinned == 8:
            index.drop(names[-1:])
        policy.check(index.ready())
