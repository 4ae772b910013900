"""Direct tiers that fail and hang in every way, against a model of what was stored.

The engine reuses its memory as soon as a call has returned. ``KVCACHE_MACHINE_EXAMPLES`` sets the
number of examples.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.testing import keys_of
from tests.support.direct_under_test import DirectUnderTest
from tests.support.failing_parts import FAULTS
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG

EXAMPLES = int(os.environ.get("KVCACHE_MACHINE_EXAMPLES", "60"))
LONGEST_PAUSE_S = 60.0  # of a circuit breaker
SOON_S = 0.01
ALL_KEYS = keys_of("chain", 9)
faults = st.just("") | st.sampled_from(FAULTS)
tiers = st.integers(0, 1)


class DirectFaults(RuleBasedStateMachine):
    """Stores, loads, lookups, resets, faults and calls that hang, in any order."""

    @initialize(
        blocks_per_call=st.integers(1, 4),
        frames=st.integers(1, 4),
        calls=st.integers(1, 3),
        lookup=st.sampled_from(["ask", "load"]),
    )
    def open(self, blocks_per_call: int, frames: int, calls: int, lookup: Any) -> None:
        logging.getLogger("kvcache").setLevel("CRITICAL")  # silences the circuit breaker
        self.clock = ManualClock()
        self.under_test = DirectUnderTest(
            2,
            deadline_s=SOON_S,
            blocks_per_call=blocks_per_call,
            frames=frames,
            calls=calls,
            breaker_clock=self.clock,
            lookup=lookup,
        )
        self.hanging: set[int] = set()
        self.offered: set[bytes] = set()  # since the last reset: only these may be found
        self.offered_blocks = 0

    @rule(tier=tiers, fault=faults)
    def set_fault(self, tier: int, fault: str) -> None:
        self.under_test.tiers[tier].fault = fault

    @rule(tier=tiers)
    def hang(self, tier: int) -> None:
        self.under_test.hang(tier)
        self.hanging.add(tier)

    @precondition(lambda self: self.hanging)
    @rule()
    def resume(self) -> None:
        """The late calls continue, after their memory was reused."""
        self.under_test.resume()
        self.hanging.clear()

    @rule(start=st.integers(0, 8), count=st.integers(0, 9))
    def put(self, start: int, count: int) -> None:
        keys = ALL_KEYS[start : start + count]
        self.offered.update(keys)
        self.offered_blocks += len(keys)
        self.under_test.put(keys, ALL_KEYS[start - 1] if start else None)

    @rule(keys=st.lists(st.sampled_from(ALL_KEYS), max_size=9, unique=True))
    def get(self, keys: Sequence[bytes]) -> None:
        found = {
            key for key, is_filled in zip(keys, self.under_test.get(keys), strict=True) if is_filled
        }
        assert found <= self.offered, "a block from before the reset"

    @rule(keys=st.lists(st.sampled_from(ALL_KEYS), max_size=9, unique=True))
    def contains(self, keys: Sequence[bytes]) -> None:
        assert len(self.under_test.direct.contains(keys)) == len(keys)

    @rule()
    def clear(self) -> None:
        self.under_test.direct.clear()
        self.offered.clear()

    @rule()
    def end_breaker_pause(self) -> None:
        self.clock.advance(LONGEST_PAUSE_S)

    @rule(count=st.integers(1, 9))
    def put_and_get_without_a_fault(self, count: int) -> None:
        self.resume()
        for tier in self.under_test.tiers:
            tier.fault = ""
        channels = [tier.channel for tier in self.under_test.direct.tiers]
        for channel in channels:
            channel.deadline_s = LONG
            channel.health.breaker.record_success()
        keys = ALL_KEYS[:count]
        self.offered.update(keys)
        self.offered_blocks += count
        held = self.under_test.put(keys)
        filled = self.under_test.get(keys)
        for channel in channels:
            channel.deadline_s = SOON_S
        assert held == filled == [True] * count

    @rule(tier=tiers, count=st.integers(1, 9), stores=st.booleans())
    def hang_in_a_load_or_store(self, tier: int, count: int, *, stores: bool) -> None:
        """The blocks are in both tiers, so a late load has something to write."""
        self.put_and_get_without_a_fault(count)
        self.hang(tier)
        if stores:
            self.put(0, 9)
        else:
            self.under_test.get(ALL_KEYS[:count])
        self.resume()

    @invariant()
    def memory_is_untouched(self) -> None:
        if hasattr(self, "under_test"):
            self.under_test.check_memory()

    def teardown(self) -> None:
        logging.getLogger("kvcache").setLevel("NOTSET")
        if not hasattr(self, "under_test"):
            return
        self.under_test.resume()
        for stats in self.under_test.direct.stats().lower:
            counted = (
                stats.stored_blocks
                + stats.known_blocks
                + stats.declined_blocks
                + stats.dropped_blocks
            )
            assert counted == self.offered_blocks
        self.under_test.close()


DirectFaults.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, deadline=None
)
TestDirectFaults = DirectFaults.TestCase
