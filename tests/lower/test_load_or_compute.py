"""A request loads from a lower tier only if that is faster than computing, on a manual clock."""

from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

from kvcache.lower.caller import REMEASURE_S
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest
from tests.support.timed_tier import TimedTier


class EngineUnderTest(StackUnderTest):
    """A stack over timed tiers, one call at a time; the engine computes a block in 0.1 s."""

    def __init__(self, tiers: int = 1, slots: int = 64, **options: Any) -> None:
        self.clock = ManualClock(100.0)
        self.timed = [TimedTier(self.clock) for _ in range(tiers)]
        super().__init__(slots=slots, tiers=self.timed, calls=1, clock=self.clock, **options)
        self.requests = 0

    def observe_compute(self) -> None:
        self.stack.observe_compute(1, 0.1)
        self.stack.observe_compute(100, 10.0)

    def new_keys(self, *tiers: int) -> list[bytes]:
        """New keys; tier ``tiers[i]`` holds the ``i``-th block."""
        self.requests += 1
        keys = keys_of(f"request {self.requests}", len(tiers))
        for key, tier in zip(keys, tiers, strict=True):
            self.timed[tier].held[NAMESPACE + key] = block_of(key, PAGE)
        return keys

    def prefetch(self, keys: list[bytes]) -> int:
        """Prefetch, and return how many of ``keys`` L1 then has."""
        prefetched = self.stack.prefetch(keys)
        assert prefetched is not None
        prefetched.result(LONG)
        return sum(self.front.contains(keys))

    def skipped(self) -> list[int]:
        return [lower.skipped_blocks for lower in self.stack.stats().lower]


@pytest.fixture
def engine() -> Iterator[EngineUnderTest]:
    engine = EngineUnderTest()
    yield engine
    engine.stack.lower.close(flush_s=0.0)
    assert engine.stack.flush(LONG)
    engine.check_invariants()
    engine.stack.close()


def test_tier_slower_than_computing_is_not_loaded_from(engine: EngineUnderTest) -> None:
    [timed] = engine.timed
    timed.load_s = 0.2
    engine.observe_compute()
    assert engine.prefetch(engine.new_keys(0, 0, 0, 0)) == 4  # nothing was measured yet
    assert engine.lower[0].claim_remeasure()  # so that no remeasurement is due
    timed.calls.clear()
    assert engine.prefetch(engine.new_keys(0, 0, 0, 0)) == 0
    assert "load" not in timed.calls
    assert engine.skipped() == [4]
    match = engine.stack.match(engine.new_keys(0, 0, 0)).result(LONG)
    assert match.blocks == 0
    assert engine.skipped() == [7]


def test_tier_faster_than_computing_is_loaded_from(engine: EngineUnderTest) -> None:
    engine.timed[0].load_s = 0.05
    engine.observe_compute()
    for _ in range(4):
        assert engine.prefetch(engine.new_keys(0, 0, 0, 0)) == 4
    assert engine.skipped() == [0]


def test_cost_of_depth_long_prompt_is_loaded_and_short_one_computed() -> None:
    """Computing a block takes 0.01 s, and 0.001 s per block before it; loading one takes 0.05 s."""
    engine = EngineUnderTest(slots=256, blocks_per_call=256)
    [timed] = engine.timed
    timed.load_s = 0.05
    assert engine.prefetch(engine.new_keys(*[0] * 4)) == 4
    for first in range(0, 200, 20):  # a long prompt in chunks
        engine.stack.observe_compute(20, 0.01 * 20 + 0.001 * 20 * (first + 10), first + 10)
    for _ in range(10):  # and short ones
        engine.stack.observe_compute(8, 0.01 * 8 + 0.001 * 8 * 4)
    assert engine.lower[0].claim_remeasure()  # so that no remeasurement is due
    assert engine.prefetch(engine.new_keys(*[0] * 10)) == 0  # 0.15 s to compute, 0.5 s to load
    assert engine.prefetch(engine.new_keys(*[0] * 200)) == 200  # 22 s to compute, 10 s to load
    engine.front.clear()
    match = engine.stack.match(engine.new_keys(*[0] * 200), 190).result(LONG)
    assert match.blocks == 10  # the end of a long prompt: 2 s to compute, 0.5 s to load
    engine.stack.close()


def test_tier_is_loaded_from_while_computing_is_not_measured(engine: EngineUnderTest) -> None:
    engine.timed[0].load_s = 50.0
    for _ in range(3):
        assert engine.prefetch(engine.new_keys(0, 0, 0, 0)) == 4
    assert engine.skipped() == [0]


def test_if_slower_load_always_loads() -> None:
    engine = EngineUnderTest(if_slower="load")
    engine.timed[0].load_s = engine.timed[0].lookup_s = 50.0
    engine.observe_compute()
    for _ in range(3):
        assert engine.prefetch(engine.new_keys(*[0] * 9)) == 9
    assert engine.skipped() == [0]
    engine.stack.close()


def test_skipped_tier_is_remeasured_and_used_once_it_is_fast(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    [timed] = engine.timed
    timed.load_s = 0.2
    engine.observe_compute()
    engine.prefetch(engine.new_keys(0, 0, 0, 0))
    timed.load_s = 0.01
    skipped, submitted = [], []
    submit = engine.stack.lower.submit

    def recording_submit(*call: Any) -> Future[Any]:
        submitted.append(submit(*call))
        return submitted[-1]

    monkeypatch.setattr(engine.stack.lower, "submit", recording_submit)
    for _ in range(12):
        engine.clock.advance(REMEASURE_S)
        engine.prefetch(engine.new_keys(0, 0, 0, 0))
        wait(submitted, LONG)  # includes the remeasurement, which no request waits for
        skipped.append(engine.skipped()[0])
    assert skipped[0] == 4
    assert skipped[-1] == skipped[-2]  # the tier is used by now


def test_tier_with_lookups_slower_than_computing_is_not_called(engine: EngineUnderTest) -> None:
    [timed] = engine.timed
    timed.lookup_s = 5.0
    engine.observe_compute()
    engine.prefetch(engine.new_keys(0, 0, 0, 0))
    assert engine.lower[0].claim_remeasure()  # so that no remeasurement is due
    timed.calls.clear()
    assert engine.prefetch(engine.new_keys(0, 0, 0, 0)) == 0
    assert timed.calls == []
    assert engine.skipped()[0] >= 4


def test_blocks_of_a_fast_tier_are_loaded_and_those_of_a_slow_one_computed() -> None:
    engine = EngineUnderTest(tiers=2)
    near, far = engine.timed
    near.load_s, far.load_s = 0.01, 1.0
    engine.prefetch(engine.new_keys(0, 0, 1, 1))
    engine.observe_compute()
    assert engine.lower[1].claim_remeasure()  # so that no remeasurement is due
    assert engine.prefetch(engine.new_keys(0, 0, 0, 1, 1, 1)) == 3
    assert engine.skipped() == [0, 3]
    # One slow block is worth loading when many fast ones follow it.
    assert engine.prefetch(engine.new_keys(1, *[0] * 40)) == 41
    engine.stack.close()


def test_slow_block_is_loaded_if_l1_holds_many_blocks_after_it(engine: EngineUnderTest) -> None:
    [timed] = engine.timed
    timed.load_s = 1.0
    engine.prefetch(engine.new_keys(0, 0))
    engine.observe_compute()
    assert engine.lower[0].claim_remeasure()  # so that no remeasurement is due
    keys = keys_of("mixed", 41)
    engine.put_in_tier(keys[:1])
    engine.put(keys[1:], keys[0])
    assert engine.stack.match(keys[:2]).result(LONG).blocks == 0
    assert engine.stack.match(keys).result(LONG).blocks == 41


def test_promotion_is_waited_for_no_longer_than_computing_takes() -> None:
    """The tier was fast and becomes slow: the request gets what was promoted in time."""
    engine = EngineUnderTest(blocks_per_call=2)
    [timed] = engine.timed
    timed.load_s = 0.01
    engine.observe_compute()
    assert engine.prefetch(engine.new_keys(*[0] * 8)) == 8
    timed.load_s = 0.3
    keys, begun = engine.new_keys(*[0] * 16), engine.clock()
    promoted = engine.prefetch(keys)
    assert 0 < promoted < 16
    engine.stack.lower.close(flush_s=0.0)  # ends the calls that are running
    # Computing would take 1.6 s. Up to three more pieces of two blocks were running then.
    assert engine.clock() - begun <= 1.6 + 3 * 2 * 0.3
    engine.stack.close()


def test_hanging_tier_costs_its_deadline_and_opens_its_breaker() -> None:
    engine = EngineUnderTest(deadline_s=0.2)
    engine.stack.observe_compute(1, 0.001)
    [timed] = engine.timed
    keys = engine.new_keys(0, 0, 0)
    timed.gate.clear()
    for _ in range(3):
        assert engine.stack.match(keys).result(LONG).blocks == 0
    assert engine.stack.stats().lower[0].breaker_open
    timed.gate.set()
    engine.stack.close()
