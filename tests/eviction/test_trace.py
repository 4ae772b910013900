"""What every policy reaches on a recorded trace, in the real index.

The conversation trace, its second half after a first half that warms the index up. Traffic, clock
and policies are deterministic, so the numbers are exact: a change of one is a change of behaviour.
``tests/bench/test_eviction.py`` has the whole table.
"""

from functools import cache

import pytest

from kvcache.eviction import POLICIES
from tests.support.eviction_traffic import Replay, belady, conversation, with_conversation

pytestmark = with_conversation


@cache
def second_half(policy: str, slots: int, *, partial: bool) -> float:
    requests = conversation(partial=partial)
    half = len(requests) // 2
    if policy == "belady":
        return belady(requests, slots, half)
    replay = Replay(POLICIES[policy], slots)
    replay.play(requests[:half])
    return replay.play(requests[half:])


@pytest.mark.parametrize(
    ("policy", "slots", "ratio"),
    [
        ("fifo", 3000, 6.68),
        ("lru", 3000, 6.56),
        ("lru", 10_000, 21.51),
        ("lru", 30_000, 33.68),
        ("s3fifo", 3000, 10.37),
        ("s3fifo-aibrix", 3000, 10.23),
        ("arc", 5000, 11.48),
        ("belady", 1000, 19.30),
        ("belady", 3000, 30.33),
        ("belady", 10_000, 39.00),
    ],
)
def test_baselines_are_honest(policy: str, slots: int, ratio: float) -> None:
    assert second_half(policy, slots, partial=True) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(
    ("slots", "bar"),
    [
        (700, 7.0),  # here and with 1,100 a stake of a hundredth of the slots is lost each time
        (1000, 8.0),
        (1100, 8.5),
        (3000, 13.8),
        (5000, 17.5),
        (10_000, 23.9),
        (30_000, 34.6),
    ],
)
def test_what_is_learned_with_partial_blocks(slots: int, bar: float) -> None:
    assert second_half("gittins", slots, partial=True) >= bar


@pytest.mark.parametrize(("slots", "share"), [(1000, 0.24), (5000, 0.24), (10_000, 0.12)])
def test_what_is_learned_with_full_blocks(slots: int, share: float) -> None:
    lru, best = (second_half(name, slots, partial=False) for name in ("lru", "belady"))
    assert second_half("gittins", slots, partial=False) >= lru + share * (best - lru)
