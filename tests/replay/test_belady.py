"""The optimum is one: no choice of what to keep finds more, on cases small enough to try them."""

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.eviction import POLICIES
from kvcache.replay.belady import optimum
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Request, Trace
from tests.support.eviction_traffic import with_conversation
from tests.support.traces import chains, conversation


def best(asked: Sequence[Sequence[int]], capacity: int) -> int:
    """The most prefix hits there can be: after each request, every set is tried."""
    reached: dict[frozenset[int], int] = {frozenset(): 0}
    for chain in asked:
        after: dict[frozenset[int], int] = {}
        for kept, hits in reached.items():
            found = next((at for at, block in enumerate(chain) if block not in kept), len(chain))
            could = sorted(kept | set(chain))
            for size in range(min(capacity, len(could)) + 1):
                for some in combinations(could, size):
                    chosen = frozenset(some)
                    after[chosen] = max(after.get(chosen, 0), hits + found)
        reached = after
    return max(reached.values())


def paths(names: Sequence[str]) -> list[list[int]]:
    """A chain for each name: a block stands for all letters up to it."""
    seen: dict[str, int] = {}
    return [
        [seen.setdefault(name[: at + 1], len(seen)) for at in range(len(name))] for name in names
    ]


@given(
    st.lists(st.text("01", min_size=0, max_size=3), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_nothing_finds_more(names: list[str], capacity: int) -> None:
    asked = paths(names)
    found = optimum(chains(*asked), capacity)
    assert found.hit_blocks == best(asked, capacity)
    assert found.hit_tokens == found.hit_blocks


@given(
    st.lists(st.text("01", min_size=0, max_size=8), min_size=1, max_size=60),
    st.integers(1, 12),
    st.sampled_from(sorted(POLICIES)),
)
def test_no_policy_finds_more(names: list[str], capacity: int, policy: str) -> None:
    trace = chains(*paths(names))
    assert replay(trace, policy, [capacity]).hit_blocks <= optimum(trace, capacity).hit_blocks


def test_what_comes_back_soonest_is_kept() -> None:
    assert optimum(chains([1], [2], [2], [1]), 1).hit_blocks == 1
    assert optimum(chains([1], [2], [3], [1]), 1).hit_blocks == 1  # 2 and 3 are not taken at all
    assert optimum(chains([1, 2, 3], [4], [1, 2, 3]), 2).hit_blocks == 2


def test_tokens_of_a_partial_block_count_as_what_they_are() -> None:
    trace = Trace.of([Request(0, 5, [1, 2]), Request(1, 5, [1, 2])], 4, partial=True)
    assert optimum(trace, 2).hit_tokens == 5


@with_conversation
def test_the_conversation() -> None:
    trace = conversation(partial=True)
    found = optimum(trace, 10_000)
    assert found.hit_blocks / len(trace.blocks) == pytest.approx(0.36641, abs=1e-5)
    full = conversation()
    hits = [optimum(full, capacity).hit_blocks for capacity in (1_000, 10_000, 100_000)]
    assert hits[0] == 54_977
    assert hits[1] == hits[2] == len(full.blocks) - full.distinct
