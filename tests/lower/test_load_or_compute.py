"""What a tier would take longer for than the engine is not loaded. Time is what the tiers say."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import pytest

from kvcache.lower.tier import REMEASURE_S
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from tests.support.failing_parts import Faulty
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


class Slow(Faulty):
    """Asking takes ``asking`` seconds and reading a block ``loading``, by the clock of the test."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.asking = self.loading = 0.0

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._clock.pass_by(self.asking)
        return super().contains(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        self._clock.pass_by(self.loading * len(keys))
        return super().load(keys, into)


class Engine(StackUnderTest):
    """A stack over slow tiers, one call at a time, and an engine that computes a block in 0.1 s."""

    def __init__(self, tiers: int = 1, slots: int = 64, **options: Any) -> None:
        self.clock = Clock()
        super().__init__(slots=slots, tiers=tiers, calls=1, clock=self.clock, **options)
        self.slow = [Slow(self.clock) for _ in range(tiers)]
        self.tiers = list(self.slow)
        for lower, tier in zip(self.lower, self.slow, strict=True):
            lower.channel.tier = tier
        self.turn = 0

    def computes(self) -> None:
        self.stack.observe_compute(1, 0.1)
        self.stack.observe_compute(100, 10.0)

    def ask(self, *where: int) -> list[bytes]:
        """New keys, of which tier ``where[i]`` has the ``i``-th block."""
        self.turn += 1
        keys = keys_of(f"turn{self.turn}", len(where))
        for key, tier in zip(keys, where, strict=True):
            self.slow[tier].held[NAMESPACE + key] = block_of(key, PAGE)
        return keys

    def comes(self, keys: list[bytes]) -> int:
        coming = self.stack.prefetch(keys)
        assert coming is not None
        coming.result(LONG)
        return sum(self.front.contains(keys))

    def skipped(self) -> list[int]:
        return [lower.skipped_blocks for lower in self.stack.stats().lower]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.stack.lower.close(flush_s=0.0)
    assert engine.stack.flush(LONG)
    engine.check_invariants()
    engine.stack.close()


def test_a_tier_that_takes_longer_is_left_alone(engine: Engine) -> None:
    [slow] = engine.slow
    slow.loading = 0.2
    engine.computes()
    assert engine.comes(engine.ask(0, 0, 0, 0)) == 4  # nothing is known yet
    engine.lower[0]._remeasured_at = engine.clock()
    slow.calls.clear()
    assert engine.comes(engine.ask(0, 0, 0, 0)) == 0
    assert "load" not in slow.calls
    assert engine.skipped() == [4]
    match = engine.stack.match(engine.ask(0, 0, 0)).result(LONG)
    assert match.blocks == 0
    assert engine.skipped() == [7]


def test_a_tier_that_takes_less_is_used(engine: Engine) -> None:
    engine.slow[0].loading = 0.05
    engine.computes()
    for _ in range(4):
        assert engine.comes(engine.ask(0, 0, 0, 0)) == 4
    assert engine.skipped() == [0]


def test_long_prompt_is_loaded_and_a_short_one_computed_where_depth_costs() -> None:
    """A block takes 0.01 s, and 0.001 s more for each block before it; loading one 0.05 s."""
    engine = Engine(slots=256, blocks_per_call=256)
    [slow] = engine.slow
    slow.loading = 0.05
    assert engine.comes(engine.ask(*[0] * 4)) == 4
    for first in range(0, 200, 20):  # a long prompt in chunks
        engine.stack.observe_compute(20, 0.01 * 20 + 0.001 * 20 * (first + 10), first + 10)
    for _ in range(10):  # and short ones
        engine.stack.observe_compute(8, 0.01 * 8 + 0.001 * 8 * 4)
    engine.lower[0]._remeasured_at = engine.clock()
    assert engine.comes(engine.ask(*[0] * 10)) == 0  # 0.15 s and 0.5 s
    assert engine.comes(engine.ask(*[0] * 200)) == 200  # 22 s and 10 s
    engine.front.clear()
    match = engine.stack.match(engine.ask(*[0] * 200), 190).result(LONG)
    assert match.blocks == 10  # the end of a long prompt: 2 s and 0.5 s
    engine.stack.close()


def test_while_either_is_unknown_it_is_used(engine: Engine) -> None:
    engine.slow[0].loading = 50.0
    for _ in range(3):
        assert engine.comes(engine.ask(0, 0, 0, 0)) == 4
    assert engine.skipped() == [0]


def test_it_can_be_turned_off() -> None:
    engine = Engine(if_slower="load")
    engine.slow[0].loading = engine.slow[0].asking = 50.0
    engine.computes()
    for _ in range(3):
        assert engine.comes(engine.ask(*[0] * 9)) == 9
    assert engine.skipped() == [0]
    engine.stack.close()


def test_a_slow_tier_is_looked_at_again_and_used_when_it_is_fast(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    [slow] = engine.slow
    slow.loading = 0.2
    engine.computes()
    engine.comes(engine.ask(0, 0, 0, 0))
    slow.loading = 0.01
    skipped, begun = [], []
    submit = engine.stack.lower.submit

    def submitted(*call: Any) -> Future[Any]:
        begun.append(submit(*call))
        return begun[-1]

    monkeypatch.setattr(engine.stack.lower, "submit", submitted)
    for _ in range(12):
        engine.clock.pass_by(REMEASURE_S)
        engine.comes(engine.ask(0, 0, 0, 0))
        wait(begun, LONG)  # nobody waits for a try but this test
        skipped.append(engine.skipped()[0])
    assert skipped[0] == 4
    assert skipped[-1] == skipped[-2]  # it is used by now


def test_asking_alone_may_take_too_long(engine: Engine) -> None:
    [slow] = engine.slow
    slow.asking = 5.0
    engine.computes()
    engine.comes(engine.ask(0, 0, 0, 0))
    engine.lower[0]._remeasured_at = engine.clock()
    slow.calls.clear()
    assert engine.comes(engine.ask(0, 0, 0, 0)) == 0
    assert slow.calls == []
    assert engine.skipped()[0] >= 4


def test_the_near_part_is_loaded_and_the_far_computed() -> None:
    engine = Engine(tiers=2)
    near, far = engine.slow
    near.loading, far.loading = 0.01, 1.0
    engine.comes(engine.ask(0, 0, 1, 1))
    engine.computes()
    engine.lower[1]._remeasured_at = engine.clock()
    assert engine.comes(engine.ask(0, 0, 0, 1, 1, 1)) == 3
    assert engine.skipped() == [0, 3]
    # A few far blocks are worth it where many near ones come after them.
    assert engine.comes(engine.ask(1, *[0] * 40)) == 41
    engine.stack.close()


def test_nobody_waits_longer_than_computing_takes() -> None:
    """It was fast, and is not any more: then what has come by then is what there is."""
    engine = Engine(blocks_per_call=2)
    [slow] = engine.slow
    slow.loading = 0.01
    engine.computes()
    assert engine.comes(engine.ask(*[0] * 8)) == 8
    slow.loading = 0.3
    keys, begun = engine.ask(*[0] * 16), engine.clock()
    came = engine.comes(keys)
    assert 0 < came < 16
    engine.stack.lower.close(flush_s=0.0)  # what was under way ends
    # Computing would take 1.6 s; the piece that comes then, and those under way, are what is more.
    assert engine.clock() - begun <= 1.6 + 3 * 2 * 0.3
    engine.stack.close()


def test_a_hung_tier_is_waited_for_no_longer_and_its_breaker_opens() -> None:
    engine = Engine(deadline_s=0.2)
    engine.stack.observe_compute(1, 0.001)
    [slow] = engine.slow
    keys = engine.ask(0, 0, 0)
    slow.gate.clear()
    match = engine.stack.match  # asked for the deadline at most
    for _ in range(3):
        assert match(keys).result(LONG).blocks == 0
    assert engine.lower[0].channel.health.breaker.open
    slow.gate.set()
    engine.stack.close()
