"""The cost of a lower tier for blocks that L1 holds: a match, and a match with its fetch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from kvcache import Stack
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import keys_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import FaultyTier

pytestmark = pytest.mark.bench

BLOCKS, ROUNDS, TURNS = 1024, 40, 20


def test_hit_in_l1_costs_the_same_with_a_lower_tier() -> None:
    keys = keys_of("a", BLOCKS)
    with ExitStack() as opened:

        def open_stack(with_lower: bool) -> Stack:
            front = DramTier(block_nbytes=PAGE, capacity=Size(2 * BLOCKS * PAGE))
            lower = (
                [LowerTier(FaultyTier(), name="l2", front=front, namespace=b"")]
                if with_lower
                else []
            )
            stack = opened.enter_context(Stack(front, lower, profile="bench"))
            front.slab.wait_populated()
            stack.reserve(keys).end()
            assert stack.flush(10)
            return stack

        stacks = {with_lower: open_stack(with_lower) for with_lower in (False, True)}

        def match(stack: Stack) -> None:
            assert stack.match(keys).result().blocks == BLOCKS

        def fetch(stack: Stack) -> None:
            stack.fetch(stack.match(keys).result()).result().end()

        calls: tuple[Callable[[Stack], None], ...] = (match, fetch)
        for call in calls:
            ratios = []
            for turn in range(ROUNDS):
                took = {}
                for with_lower in (True, False) if turn % 2 else (False, True):
                    begun = time.perf_counter()
                    for _ in range(TURNS):
                        call(stacks[with_lower])
                    took[with_lower] = time.perf_counter() - begun
                ratios.append(took[True] / took[False])
            print(f"{call.__name__}: with / without, quartiles", statistics.quantiles(ratios, n=4))
            assert statistics.median(ratios) <= 1.1
