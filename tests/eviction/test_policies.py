"""In which order blocks leave, by policy; and that a policy knows what the index holds, no more."""

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


def order(policy: Policy, keep: Callable[[bytes], bool] = lambda _: False) -> str:
    return b"".join(evict_blocks(policy, stays=keep)).decode()


def test_fifo_takes_the_oldest_chain_its_tail_first() -> None:
    policy = Fifo(9)
    add(policy, "abc")
    add(policy, "xy")
    policy.access(keys("abc"), 3, 1.0)
    assert order(policy) == "cbayx"


def test_lru_takes_the_chain_that_was_not_used_longest() -> None:
    policy = Lru(9)
    add(policy, "abc")
    add(policy, "xy")
    policy.access(keys("ab"), 2, 1.0)
    assert order(policy) == "cyxba"


def test_lru_an_answer_that_grows_makes_its_chain_the_newest() -> None:
    policy = Lru(9)
    add(policy, "ab")
    add(policy, "x")
    add(policy, "c", parent="b")
    assert order(policy) == "xcba"


def test_lru_two_chains_with_one_head() -> None:
    policy = Lru(9)
    add(policy, "hab")
    add(policy, "xy", parent="h")
    policy.access(keys("hxy"), 3, 1.0)
    assert order(policy) == "bayxh"


def test_lru_a_block_used_without_its_ancestors() -> None:
    policy = Lru(9)
    add(policy, "abc")
    policy.access(keys("b"), 1, 1.0)
    assert order(policy) == "cab"


def test_lru_only_what_was_found_is_used() -> None:
    policy = Lru(9)
    add(policy, "abc")
    add(policy, "x")
    policy.access(keys("abcd"), 1, 1.0)
    assert order(policy) == "cbxa"


def test_s3fifo_blocks_seen_once_leave_before_those_in_use() -> None:
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


def test_s3fifo_the_used_part_of_a_chain_stays() -> None:
    policy = S3Fifo(4, small=0.5)
    add(policy, "abcd")
    for _ in range(2):
        policy.access(keys("ab"), 2, 1.0)
    assert order(policy)[:2] == "dc"


def test_s3fifo_a_block_that_comes_back_soon_is_not_on_probation() -> None:
    policy = S3Fifo(4, small=0.5)
    add(policy, "ab")
    assert order(policy) == "ba"
    add(policy, "ax")
    add(policy, "vw")
    assert evict_blocks(policy, 1) == [b"x"]  # unlike `a`, it was not known
    assert policy._owner[b"a"].queue is policy._main


def test_s3fifo_remembers_no_more_than_it_could_hold() -> None:
    policy = S3Fifo(5, small=0.5)
    for at in range(100):
        policy.add([b"%d" % at], None, 0.0)
        evict_blocks(policy, 1)
    assert len(policy._ghost) == 5


def test_s3fifo_only_what_left_probation_is_remembered() -> None:
    policy = S3Fifo(4, small=0.25)
    add(policy, "a")
    add(policy, "b")
    for _ in range(2):
        policy.access(keys("a"), 1, 1.0)
    assert order(policy) == "ba"
    assert set(policy._ghost) == {b"b"}


def test_s3fifo_uses_are_forgotten_with_their_block() -> None:
    policy = S3Fifo(4)
    add(policy, "ab")
    policy.access(keys("abc"), 3, 1.0)  # the engine had `c` itself
    assert set(policy._uses) == {b"a", b"b"}
    policy.remove(keys("b"))
    assert set(policy._uses) == {b"a"}
    assert order(policy) == "a"
    assert policy._uses == {}


def test_s3fifo_of_aibrix_takes_one_use_for_enough() -> None:
    for made, first in ((S3Fifo, "b"), (AibrixS3Fifo, "y")):
        policy = made(4)
        add(policy, "ab")
        policy.access(keys("ab"), 2, 1.0)
        add(policy, "xy")
        assert order(policy)[0] == first


def in_main(names: str, small: float = 0.5) -> S3Fifo:
    """A policy with these blocks in its main queue, none used since."""
    policy = S3Fifo(8, small)
    for name in names:
        add(policy, name)
    order(policy)  # all leave, and come back soon
    for name in names:
        add(policy, name)
    assert policy._main.blocks == len(names)
    return policy


def test_s3fifo_main_gives_another_round_to_what_was_used() -> None:
    policy = in_main("xyz")
    policy.access(keys("x"), 1, 2.0)
    assert order(policy) == "yzx"


def test_s3fifo_main_gives_when_few_are_on_probation() -> None:
    policy = in_main("xyz", small=0.25)
    add(policy, "a")
    assert evict_blocks(policy, 1) == [b"x"]
    add(policy, "b")
    assert evict_blocks(policy, 1) == [b"a"]


def test_s3fifo_main_gives_when_all_on_probation_is_in_use() -> None:
    policy = in_main("xyz", small=0.25)
    add(policy, "a")
    add(policy, "b")
    assert order(policy, keep=lambda key: key in b"ab") == "xyz"


def test_what_is_cut_off_still_knows_what_it_continues() -> None:
    policy = Lru(9)
    add(policy, "abc")
    policy.access(keys("ab"), 2, 1.0)
    assert policy._owner[b"c"].parent == b"b"


@pytest.mark.parametrize("policy", POLICIES.values())
def test_what_is_kept_is_passed_over_with_what_it_stands_on(policy: type[Policy]) -> None:
    ours = policy(9)
    add(ours, "abc")
    add(ours, "xyz")
    assert order(ours, keep=lambda key: key == b"b") == "czyx"
    assert sorted(order(ours)) == ["a", "b"]


@pytest.mark.parametrize("policy", POLICIES.values())
def test_when_all_is_kept_there_is_an_end(policy: type[Policy]) -> None:
    ours = policy(9)
    add(ours, "abc")
    add(ours, "xyz")
    ours.access(keys("xyz"), 3, 1.0)
    assert order(ours, keep=lambda _: True) == ""
    assert sorted(order(ours)) == list("abcxyz")


@pytest.mark.parametrize("policy", POLICIES.values())
def test_an_answer_cut_short_forgets_only_what_was_given(policy: type[Policy]) -> None:
    ours = policy(9)
    add(ours, "abc")
    add(ours, "xyz")
    some = b"".join(evict_blocks(ours, 2)).decode()
    assert sorted(some + order(ours)) == list("abcxyz")


@pytest.mark.parametrize("policy", POLICIES.values())
def test_removed_keys_are_forgotten(policy: type[Policy]) -> None:
    ours = policy(9)
    add(ours, "abc")
    add(ours, "xy")
    ours.remove(keys("bx"))
    assert sorted(order(ours)) == ["a", "c", "y"]


@pytest.mark.parametrize("name", POLICIES)
def test_growing_a_block_at_a_time_costs_no_more_per_block(name: str) -> None:
    """A chain built a block at a time, then pushed out: questions asked grow with its length."""

    def asked(length: int) -> int:
        policy, count, children = POLICIES[name](2 * length), 0, set[bytes]()
        names = [b"%d" % at for at in range(length)]
        for at, key in enumerate(names):
            policy.add([key], names[at - 1] if at else None, 0.0)
        children.update(names[:-1])

        def keep(key: bytes) -> bool:
            nonlocal count
            count += 1
            return key in children

        for at in range(length):
            [left] = evict_blocks(policy, 1, keep)
            assert left == names[length - 1 - at]
            if at + 1 < length:
                children.remove(names[length - 2 - at])
        return count

    assert asked(400) <= 2.2 * asked(200)


chains = st.text("01", min_size=1, max_size=8)


@given(
    st.sampled_from(sorted(name for name, made in POLICIES.items() if issubclass(made, RunPolicy))),
    st.lists(st.tuples(chains, st.integers(0, 8)), max_size=60),
)
def test_a_policy_of_queues_knows_what_the_index_holds(
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
        assert set(policy._owner) == set(index.ready())
        if isinstance(policy, S3Fifo):
            assert set(policy._uses) <= set(index.ready())
            assert all(1 <= uses <= 3 for uses in policy._uses.values())
        queues = [queue for queue in vars(policy).values() if hasattr(queue, "blocks")]
        runs = [run for queue in queues for run in queue._runs]
        assert sum(queue.blocks for queue in queues) == len(index)
        assert sorted(key for run in runs for key in run.keys) == sorted(index.ready())
        assert all(policy._owner[key] is run for run in runs for key in run.keys)
