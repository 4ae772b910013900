"""Lookups of direct tiers report only blocks worth a load, on a manual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvcache.lower.caller import REMEASURE_S
from kvcache.testing import keys_of
from tests.support.direct_under_test import DirectUnderTest, stored
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG
from tests.support.timed_tier import TimedTier

KEYS = keys_of("a", 6)


class TimedDirect(DirectUnderTest):
    """Timed tiers, one call at a time; the engine computes a block in 0.1 s."""

    def __init__(self, tiers: int = 1, **options: Any) -> None:
        self.clock = ManualClock(100.0)
        super().__init__(
            [TimedTier(self.clock) for _ in range(tiers)],
            clock=self.clock,
            calls=1,
            blocks_per_call=64,
            frames=64,
            **options,
        )
        self.requests = 0

    def observe_compute(self) -> None:
        self.direct.observe_compute(1, 0.1)
        self.direct.observe_compute(100, 10.0)

    def new_keys(self, *tiers: int | None) -> list[bytes]:
        """New keys; tier ``tiers[i]`` holds the ``i``-th block."""
        self.requests += 1
        keys = keys_of(f"request {self.requests}", len(tiers))
        for key, tier in zip(keys, tiers, strict=True):
            if tier is not None:
                self.tiers[tier].held |= stored([key])
        return keys

    def settle(self) -> None:
        """Use up the remeasurements that are due now, and wait for those that run."""
        for tier in self.direct.tiers:
            tier.claim_remeasure()
        self.wait_idle()

    def skipped(self) -> list[int]:
        return [stats.skipped_blocks for stats in self.direct.stats().lower]


def test_contains_without_measurements_reports_every_held_block() -> None:
    under_test = TimedDirect()
    under_test.tiers[0].load_s = 50.0
    for _ in range(3):
        keys = under_test.new_keys(0, 0, None, 0)
        assert under_test.direct.contains(keys) == [True, True, False, True]
        under_test.get(keys)
    assert under_test.skipped() == [0]
    under_test.close()


def test_contains_reports_no_block_that_loads_slower_than_the_engine_computes() -> None:
    under_test = TimedDirect()
    under_test.tiers[0].load_s = 0.2
    under_test.observe_compute()
    keys = under_test.new_keys(0, 0, 0, 0)
    assert under_test.direct.contains(keys) == [True] * 4
    under_test.get(keys)
    under_test.settle()
    assert under_test.direct.contains(under_test.new_keys(0, 0, None, 0)) == [False] * 4
    assert under_test.skipped() == [3]
    under_test.close()


def test_contains_reports_a_slow_block_that_many_fast_ones_follow() -> None:
    under_test = TimedDirect(tiers=2)
    near, far = under_test.tiers
    near.load_s, far.load_s = 0.01, 1.0
    under_test.get(under_test.new_keys(0, 0, 0))
    near.load_s = 0.0  # so that its misses below take no time
    far_keys = under_test.new_keys(1, 1, 1)
    under_test.get(far_keys)
    under_test.observe_compute()
    under_test.settle()
    assert under_test.direct.contains(under_test.new_keys(0, 0, 1, 1)) == [True, True, False, False]
    under_test.settle()
    assert under_test.direct.contains(under_test.new_keys(1, *[0] * 40)) == [True] * 41
    under_test.close()


def test_contains_reports_deep_blocks_that_take_longer_to_compute() -> None:
    """Computing a block takes 0.01 s, and 0.001 s per block before it; loading one takes 0.05 s."""
    under_test = TimedDirect()
    under_test.tiers[0].load_s = 0.05
    under_test.get(under_test.new_keys(0, 0, 0, 0))
    for first in range(0, 200, 20):  # a long prompt in chunks
        seconds = 0.01 * 20 + 0.001 * 20 * (first + 10)
        under_test.direct.observe_compute(20, seconds, first + 10)
    for _ in range(10):  # and short ones
        under_test.direct.observe_compute(8, 0.01 * 8 + 0.001 * 8 * 4)
    under_test.settle()
    keys = under_test.new_keys(*[0] * 10)
    assert under_test.direct.contains(keys) == [False] * 10  # 0.15 s to compute, 0.5 s to load
    assert under_test.direct.contains(keys, depth=190) == [True] * 10  # 2 s to compute
    under_test.close()


def test_contains_does_not_ask_a_tier_with_lookups_slower_than_computing() -> None:
    under_test = TimedDirect()
    under_test.tiers[0].lookup_s = 5.0
    under_test.observe_compute()
    under_test.direct.contains(under_test.new_keys(0, 0))
    under_test.settle()
    under_test.tiers[0].calls.clear()
    assert under_test.direct.contains(under_test.new_keys(0, 0)) == [False, False]
    assert under_test.tiers[0].calls == []
    assert under_test.skipped() == [2]
    under_test.close()


def test_tier_with_slow_lookups_is_asked_again_once_they_are_fast() -> None:
    under_test = TimedDirect()
    [tier] = under_test.tiers
    tier.lookup_s = 5.0
    under_test.observe_compute()
    under_test.direct.contains(under_test.new_keys(0, 0))
    tier.lookup_s = 0.0
    reported = []
    for _ in range(20):
        under_test.clock.advance(REMEASURE_S)
        reported.append(all(under_test.direct.contains(under_test.new_keys(0, 0))))
        under_test.wait_idle()
        under_test.wait_idle()
    assert not reported[0]
    assert reported[-1]
    under_test.close()


def test_if_slower_load_reports_every_held_block() -> None:
    under_test = TimedDirect(if_slower="load")
    under_test.tiers[0].load_s = under_test.tiers[0].lookup_s = 50.0
    under_test.observe_compute()
    for _ in range(3):
        keys = under_test.new_keys(0, 0)
        assert under_test.direct.contains(keys) == [True, True]
        under_test.get(keys)
    under_test.close()


def test_skipped_tier_is_remeasured_and_reported_again_once_it_is_fast() -> None:
    under_test = TimedDirect()
    [tier] = under_test.tiers
    tier.load_s = 0.2
    under_test.observe_compute()
    under_test.get(under_test.new_keys(0, 0, 0, 0))
    tier.load_s = 0.01
    reported = []
    for _ in range(12):
        under_test.clock.advance(REMEASURE_S)
        reported.append(all(under_test.direct.contains(under_test.new_keys(0, 0, 0, 0))))
        under_test.wait_idle()  # for the lookup, and then for the load
        under_test.wait_idle()
    assert not reported[0]
    assert reported[-1]
    under_test.close()


def test_tier_that_hangs_in_a_remeasurement_gets_no_second_one() -> None:
    under_test = TimedDirect()
    [tier] = under_test.tiers
    tier.load_s = 0.2
    under_test.observe_compute()
    under_test.get(under_test.new_keys(0, 0, 0, 0))
    [direct] = under_test.direct.tiers
    under_test.hang()
    direct.remeasure(KEYS)
    assert tier.waiting.acquire(timeout=LONG)
    for _ in range(5):
        under_test.clock.advance(REMEASURE_S)
        direct.remeasure(KEYS)
    tier.calls.clear()
    under_test.resume()
    assert tier.calls == []
    under_test.close()


@pytest.mark.parametrize(
    ("sources", "reports"),
    [((0, 0, 0, 0), all), ((0, 0, None, None), any)],
    ids=["prompts that it holds", "prompts of which it holds a shared beginning"],
)
def test_skipped_tier_with_lookup_load_is_remeasured_without_a_lookup(
    sources: Sequence[int | None], reports: Callable[[Sequence[bool]], bool]
) -> None:
    under_test = TimedDirect(lookup="load")
    [tier] = under_test.tiers
    tier.load_s = 0.2
    under_test.observe_compute()
    under_test.get(under_test.new_keys(0, 0, 0, 0))
    tier.load_s = 0.01
    reported = []
    for _ in range(12):
        under_test.clock.advance(REMEASURE_S)
        reported.append(reports(under_test.direct.contains(under_test.new_keys(*sources))))
        under_test.wait_idle()  # for the load of all, and then for that of the held ones
        under_test.wait_idle()
    assert not reported[0]
    assert reported[-1]
    assert "contains" not in tier.calls
    under_test.close()
