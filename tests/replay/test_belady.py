"""The optimum: on small cases, no choice of blocks to keep has more hits."""

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.eviction import POLICIES
from kvcache.replay.belady import optimum
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Request, Trace
from tests.support.traces import conversation, needs_conversation, trace_of


def most_hits(chains: Sequence[Sequence[int]], capacity: int) -> int:
    """Return the most prefix hits possible: after each request, it tries to keep every set."""
    hits_by_kept: dict[frozenset[int], int] = {frozenset(): 0}
    for chain in chains:
        after: dict[frozenset[int], int] = {}
        for kept, hits in hits_by_kept.items():
            found = next((at for at, block in enumerate(chain) if block not in kept), len(chain))
            candidates = sorted(kept | set(chain))
            for size in range(min(capacity, len(candidates)) + 1):
                for chosen in map(frozenset, combinations(candidates, size)):
                    after[chosen] = max(after.get(chosen, 0), hits + found)
        hits_by_kept = after
    return max(hits_by_kept.values())


def paths(names: Sequence[str]) -> list[list[int]]:
    """Return a chain for each name; a block stands for all letters up to it."""
    ids: dict[str, int] = {}
    return [[ids.setdefault(name[: at + 1], len(ids)) for at in range(len(name))] for name in names]


@given(
    st.lists(st.text("01", min_size=0, max_size=3), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_optimum_of_small_cases_is_the_most_hits(names: list[str], capacity: int) -> None:
    chains = paths(names)
    result = optimum(trace_of(*chains), capacity)
    assert result.hit_blocks == most_hits(chains, capacity)
    assert result.hit_tokens == result.hit_blocks


@given(
    st.lists(st.text("01", min_size=0, max_size=8), min_size=1, max_size=60),
    st.integers(1, 12),
    st.sampled_from(sorted(POLICIES)),
)
def test_policy_has_at_most_the_hits_of_the_optimum(
    names: list[str], capacity: int, policy: str
) -> None:
    trace = trace_of(*paths(names))
    assert replay(trace, policy, [capacity]).hit_blocks <= optimum(trace, capacity).hit_blocks


def test_optimum_keeps_the_block_with_the_nearest_next_use() -> None:
    assert optimum(trace_of([1], [2], [2], [1]), 1).hit_blocks == 1
    assert optimum(trace_of([1], [2], [3], [1]), 1).hit_blocks == 1  # 2 and 3 are declined
    assert optimum(trace_of([1, 2, 3], [4], [1, 2, 3]), 2).hit_blocks == 2


def test_optimum_counts_the_tokens_of_a_partial_block() -> None:
    trace = Trace.of([Request(0, 5, [1, 2]), Request(1, 5, [1, 2])], 4, partial=True)
    assert optimum(trace, 2).hit_tokens == 5


def test_optimum_counts_hits_from_the_first_request_on() -> None:
    trace = trace_of([1, 2], [1, 2], [1, 2])
    assert [optimum(trace, 2, first).hit_blocks for first in range(4)] == [4, 4, 2, 0]


@needs_conversation
def test_optimum_of_the_conversation() -> None:
    trace = conversation(partial=True)
    result = optimum(trace, 10_000)
    assert result.hit_blocks / len(trace.blocks) == pytest.approx(0.36641, abs=1e-5)
    full = conversation()
    hits = [optimum(full, capacity).hit_blocks for capacity in (1_000, 10_000, 100_000)]
    assert hits[0] == 54_977
    assert hits[1] == hits[2] == len(full.blocks) - full.distinct
