"""Direct tiers: right blocks or none from the nearest tier, within deadlines, and counters."""

from __future__ import annotations

import array
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvcache.slab import PAGE
from kvcache.stats import LowerStats
from kvcache.testing import block_of, keys_of
from tests.support.direct_under_test import DirectUnderTest, size_of, stored
from tests.support.failing_parts import FAULTS, FaultyTier
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, NAMESPACE, NEVER

KEYS = keys_of("a", 6)
SOON_S = 0.02
ALL, NONE = [True] * 6, [False] * 6


@pytest.fixture
def under_test() -> Iterator[DirectUnderTest]:
    under_test = DirectUnderTest(tiers=2)
    yield under_test
    under_test.close()


def counters(under_test: DirectUnderTest, tier: int = 0) -> LowerStats:
    under_test.wait_idle()
    return under_test.direct.stats().lower[tier]


def accounted_blocks(stats: LowerStats) -> int:
    return stats.stored_blocks + stats.known_blocks + stats.declined_blocks + stats.dropped_blocks


# Blocks


def test_stored_blocks_are_in_every_tier_and_loaded_again(under_test: DirectUnderTest) -> None:
    assert under_test.direct.contains(KEYS) == NONE
    assert under_test.get(KEYS) == NONE
    assert under_test.put(KEYS) == ALL
    assert under_test.held(0) == under_test.held(1) == set(KEYS)
    assert under_test.direct.contains([*KEYS, b"unknown"]) == [*ALL, False]
    assert under_test.get([*KEYS, b"unknown"]) == [*ALL, False]


def test_load_takes_each_block_from_the_nearest_tier_that_returns_it(
    under_test: DirectUnderTest,
) -> None:
    under_test.put(KEYS)
    near, far = under_test.tiers
    for key in KEYS[1::2]:
        near.remove([NAMESPACE + key])
    far.read.clear()
    assert under_test.get(KEYS) == ALL
    assert far.read == [NAMESPACE + key for key in KEYS[1::2]]


def test_contains_asks_a_tier_only_for_what_the_tiers_before_it_lack() -> None:
    asked: list[Sequence[bytes]] = []

    class RecordingTier(FaultyTier):
        def contains(self, keys: Sequence[bytes]) -> list[bool]:
            asked.append([key.removeprefix(NAMESPACE) for key in keys])
            return super().contains(keys)

    under_test = DirectUnderTest([FaultyTier(), RecordingTier()])
    under_test.put(KEYS)
    under_test.tiers[0].remove([NAMESPACE + KEYS[2]])
    asked.clear()
    assert under_test.direct.contains(KEYS) == ALL
    assert asked == [[KEYS[2]]]
    under_test.tiers[0].held |= under_test.tiers[1].held
    assert under_test.direct.contains(KEYS) == ALL
    assert len(asked) == 1
    under_test.close()


def test_store_offers_a_tier_only_what_it_lacks_with_the_parent_of_each_run() -> None:
    stores: list[tuple[list[bytes], bytes | None]] = []

    class RecordingTier(FaultyTier):
        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            stores.append((list(keys), parent))
            return super().store(keys, blocks, parent)

    under_test = DirectUnderTest([RecordingTier()], calls=1, blocks_per_call=4)
    names = [NAMESPACE + key for key in KEYS]
    under_test.put(KEYS[1:2], KEYS[0])
    under_test.put(KEYS)
    assert stores == [
        (names[1:2], names[0]),
        (names[:1], None),
        (names[2:4], names[1]),
        (names[4:], names[3]),
    ]
    stats = counters(under_test)
    assert (stats.stored_blocks, stats.known_blocks) == (6, 1)
    under_test.close()


def test_store_branches_stores_several_segments(under_test: DirectUnderTest) -> None:
    blocks = [block_of(key, size_of(key)) for key in KEYS]
    branches = [(KEYS[:2], None), (KEYS[2:3], KEYS[0]), (KEYS[3:], KEYS[1])]
    assert under_test.direct.store_branches(branches, blocks) == ALL
    assert under_test.get(KEYS) == ALL


@pytest.mark.parametrize(
    "make",
    [bytearray, lambda nbytes: (ctypes.c_char * nbytes)(), lambda n: array.array("H", bytes(n))],
)
def test_any_contiguous_memory_is_a_buffer(under_test: DirectUnderTest, make: Any) -> None:
    buffer = make(PAGE)
    memoryview(buffer).cast("B")[:] = block_of(KEYS[0], PAGE)
    assert under_test.direct.store(KEYS[:1], [buffer]) == [True]
    into = make(PAGE)
    assert under_test.direct.load(KEYS[:1], [into]) == [True]
    assert memoryview(into).cast("B") == block_of(KEYS[0], PAGE)


def test_buffers_of_a_wrong_kind_are_refused(under_test: DirectUnderTest) -> None:
    load, store = under_test.direct.load, under_test.direct.store
    key = KEYS[:1]
    for wrong in (bytes(PAGE), bytearray(), bytearray(PAGE + 1), memoryview(bytearray(PAGE))[::2]):
        with pytest.raises(ValueError, match="buffer"):
            load(key, [wrong])
    for wrong in (b"", bytes(PAGE + 1), memoryview(bytes(PAGE))[::2]):
        with pytest.raises(ValueError, match="buffer"):
            store(key, [wrong])
    with pytest.raises(ValueError, match="2 buffers for 1 keys"):
        load(key, [bytearray(1), bytearray(1)])
    with pytest.raises(TypeError):
        load(key, ["text"])
    assert under_test.tiers[0].calls == []


def test_block_of_another_size_is_a_miss(under_test: DirectUnderTest) -> None:
    assert under_test.direct.store(KEYS[:1], [b"k" * 100]) == [True]
    larger = bytearray(101)
    assert under_test.direct.load(KEYS[:1], [larger]) == [False]
    exact = bytearray(100)
    assert under_test.direct.load(KEYS[:1], [exact]) == [True]
    assert exact == b"k" * 100


def test_empty_batches_call_no_tier(under_test: DirectUnderTest) -> None:
    assert under_test.direct.contains([]) == []
    assert under_test.direct.load([], []) == []
    assert under_test.direct.store([], []) == []
    assert under_test.tiers[0].calls == []


# Failures


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_one_tier_leaves_the_other_tier_usable(
    under_test: DirectUnderTest, fault: str
) -> None:
    under_test.put(KEYS)
    under_test.tiers[0].fault = fault
    assert under_test.get(KEYS) == ALL
    held = under_test.direct.contains([*KEYS, b"unknown"])
    assert held[:6] == ALL
    others = keys_of("b", 6)
    assert under_test.put(others) == ALL
    assert under_test.held(1) == {*KEYS, *others}
    for tier in (0, 1):
        assert accounted_blocks(counters(under_test, tier)) == 12


def test_store_to_a_failing_tier_counts_every_block_once() -> None:
    under_test = DirectUnderTest(blocks_per_call=1, calls=1, breaker_failures=NEVER)
    under_test.tiers[0].fault = "raise"
    keys = keys_of("many", 20)
    assert under_test.put(keys) == [False] * 20
    stats = counters(under_test)
    assert accounted_blocks(stats) == 20
    assert 1 <= stats.declined_blocks <= 4  # the calls that were in flight at the first failure
    assert stats.dropped_blocks == 20 - stats.declined_blocks
    under_test.close()


def test_damaged_frame_is_loaded_from_the_next_tier(under_test: DirectUnderTest) -> None:
    under_test.put(KEYS)
    near = under_test.tiers[0]
    for name in list(near.held)[:3]:
        near.held[name] = near.held[name][:-1] + b"\xff"
        near.held[name] = near.held[name][:5000] + b"\xff" + near.held[name][5001:]
    assert under_test.get(KEYS) == ALL
    assert sum(counters(under_test).usage.rejected_blocks.values()) == 3
    assert counters(under_test, 1).loaded_blocks == 3


def test_hanging_tier_costs_one_deadline_and_the_next_tier_answers() -> None:
    """Twelve calls would be needed for all blocks; two are made."""
    under_test = DirectUnderTest(
        2, deadline_s=SOON_S, blocks_per_call=1, calls=1, breaker_failures=NEVER
    )
    keys = keys_of("many", 12)
    under_test.direct.tiers[1].channel.deadline_s = LONG
    under_test.tiers[1].held.update(stored(keys))
    under_test.tiers[0].held.update(stored(keys))
    under_test.hang()
    assert under_test.get(keys) == [True] * 12
    assert under_test.tiers[0].calls.count("load") <= 1
    assert under_test.direct.stats().lower[0].errors <= 2
    under_test.resume()
    assert counters(under_test, 1).loaded_blocks == 12
    under_test.close()


def test_store_with_a_tier_that_hangs_is_held_by_the_other() -> None:
    under_test = DirectUnderTest(2, deadline_s=SOON_S, breaker_failures=NEVER)
    under_test.direct.tiers[1].channel.deadline_s = LONG
    under_test.hang()
    assert under_test.put(KEYS) == ALL
    assert under_test.held(1) == set(KEYS)
    assert under_test.direct.stats().lower[0].errors >= 1
    under_test.close()


def test_slow_tier_has_its_deadline_for_each_call() -> None:
    """Three calls are queued at once, and take longer than one deadline together."""
    deadline_s = 2.0

    class SlowTier(FaultyTier):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            threading.Event().wait(0.4 * deadline_s)
            return super().load(keys, into)

    under_test = DirectUnderTest([SlowTier()], deadline_s=deadline_s, blocks_per_call=1, calls=1)
    keys = keys_of("slow", 3)
    under_test.tiers[0].held.update(stored(keys))
    assert under_test.get(keys) == [True] * 3
    assert under_test.direct.stats().lower[0].errors == 0
    durations = under_test.direct.take_durations()
    assert [(operation, error) for _, operation, error, _ in durations] == [("load", "")] * 3
    under_test.close()


def test_breaker_opens_after_three_failures_and_closes_after_a_probe(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    under_test = DirectUnderTest(breaker_clock=clock)
    [tier] = under_test.tiers
    under_test.put(KEYS)
    tier.fault = "raise"
    for _ in range(3):
        assert under_test.direct.contains(KEYS) == NONE
    assert not under_test.direct.accepts_calls
    tier.calls.clear()
    tier.fault = ""
    assert under_test.get(KEYS) == NONE
    assert under_test.put(KEYS) == NONE
    assert tier.calls == []
    assert counters(under_test).dropped_blocks == 6
    clock.advance(1.0)
    assert under_test.get(KEYS[:4]) == [True] * 4
    assert "tier t1: circuit breaker closed" in caplog.text
    assert under_test.get(KEYS) == ALL
    under_test.close()


def test_tier_that_hangs_is_not_called_after_three_deadlines() -> None:
    under_test = DirectUnderTest(deadline_s=SOON_S, breaker_clock=ManualClock())
    under_test.hang()
    for _ in range(3):
        assert under_test.direct.contains(KEYS) == NONE
    assert not under_test.direct.accepts_calls
    begun = len(under_test.tiers[0].calls)
    assert under_test.put(KEYS) == NONE
    assert under_test.get(KEYS) == NONE
    assert len(under_test.tiers[0].calls) == begun
    under_test.close()


# lookup = "load"


def test_lookup_load_asks_nothing_and_ends_a_load_at_the_first_miss() -> None:
    under_test = DirectUnderTest(lookup="load", blocks_per_call=2)
    [tier] = under_test.tiers
    keys = keys_of("many", 12)
    tier.held.update(stored(keys[:3]))
    assert under_test.direct.contains(keys) == [True] * 12
    assert tier.calls == []
    assert under_test.get(keys) == [True] * 3 + [False] * 9
    assert len(tier.read) <= 6  # the first call alone, then two at once
    assert under_test.direct.contains(keys[:4]) == [True, True, True, False]
    stats = counters(under_test)
    assert (stats.hit_blocks, stats.loaded_blocks, stats.missed_blocks) == (3, 3, 0)
    tier.calls.clear()
    assert under_test.put(keys) == [True] * 12
    assert "contains" not in tier.calls
    assert counters(under_test).known_blocks == 3
    assert counters(under_test).stored_blocks == 9
    under_test.close()
