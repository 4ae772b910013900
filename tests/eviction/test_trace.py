"""Hit ratios of the policies on a recorded trace, in the real index.

They are of the second half of the conversation trace; the first half warms the index up. Traffic,
clock and policies are deterministic, so the numbers are exact: another number is another behaviour.
``tests/bench/test_eviction.py`` prints the whole table.
"""

from functools import cache

import pytest

from kvcache.eviction import POLICIES
from kvcache.replay.belady import optimum
from kvcache.replay.simulate import SimulatedTiers
from tests.support.traces import conversation, halves, needs_conversation, play

pytestmark = needs_conversation


@cache
def second_half(policy: str, slots: int, *, partial: bool) -> float:
    trace = conversation(partial=partial)
    first, second = halves(trace)
    if policy == "belady":
        return 100 * optimum(trace, slots, len(first)).hit_blocks / len(second.blocks)
    tiers = SimulatedTiers(POLICIES[policy], [slots])
    play(tiers, first)
    return play(tiers, second)


@pytest.mark.parametrize(
    ("policy", "slots", "ratio"),
    [
        ("fifo", 3000, 6.55),
        ("lru", 3000, 6.56),
        ("lru", 10_000, 21.51),
        ("lru", 30_000, 33.68),
        ("s3fifo", 3000, 10.35),
        ("s3fifo-aibrix", 3000, 10.23),
        ("arc", 5000, 11.50),
        ("belady", 1000, 19.30),
        ("belady", 3000, 30.33),
        ("belady", 10_000, 39.00),
    ],
)
def test_baseline_hit_ratios_are_exact(policy: str, slots: int, ratio: float) -> None:
    assert second_half(policy, slots, partial=True) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(
    ("slots", "bar"),
    [
        (700, 7.0),  # with 700 and 1,100 slots, a stake of 1 % of the slots is lost each time
        (1000, 8.0),
        (1100, 8.5),
        (3000, 13.8),
        (5000, 17.5),
        (10_000, 23.9),
        (30_000, 34.6),
    ],
)
def test_gittins_with_partial_blocks_reaches_its_bar(slots: int, bar: float) -> None:
    assert second_half("gittins", slots, partial=True) >= bar


@pytest.mark.parametrize(("slots", "share"), [(1000, 0.24), (5000, 0.24), (10_000, 0.12)])
def test_gittins_with_full_blocks_closes_its_share_of_the_gap(slots: int, share: float) -> None:
    lru, best = (second_half(name, slots, partial=False) for name in ("lru", "belady"))
    assert second_half("gittins", slots, partial=False) >= lru + share * (best - lru)
