"""A whole stack over a lower tier that fails in every way, against a model of what was stored.

tests/tiers/test_storing_tiers.py runs it over every tier that stores blocks.

``KVCACHE_MACHINE_EXAMPLES`` sets the number of examples: 25,000 are a million operations.
"""

import logging
import os
from collections import Counter
from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvcache import Lease
from tests.support.failing_parts import FAULTS, StoringTier, replace_policy_method
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, NAMESPACE, StackUnderTest
from tests.support.wrong_results import EXCEPTIONS

EXAMPLES = int(os.environ.get("KVCACHE_MACHINE_EXAMPLES", "120"))
LONGEST_PAUSE_S = 60.0  # of a circuit breaker
faults = st.just("") | st.sampled_from(FAULTS)
done: Counter[str] = Counter()  # in this process


class Faults(RuleBasedStateMachine):
    """Stores, loads, resets and faults in any order. The counters must add up at the end."""

    reading: Bundle[Lease] = Bundle("reading")
    chains = st.sampled_from(["0", "00", "000", "00000", "001", "00111", "1", "11"])

    def new_tier(self) -> tuple[StoringTier, bytes]:
        """Return a tier, and a namespace of which it holds no block."""
        return StoringTier(), NAMESPACE

    @initialize(
        slots=st.integers(1, 10),
        blocks_per_call=st.integers(1, 4),
        queue=st.integers(1, 10),
        lookup=st.sampled_from(["ask", "load"]),
    )
    def open(
        self, slots: int, blocks_per_call: int, queue: int, lookup: Literal["ask", "load"]
    ) -> None:
        self.clock = ManualClock()
        tier, namespace = self.new_tier()
        self.under_test = StackUnderTest(
            slots=slots,
            tiers=[tier],
            blocks_per_call=blocks_per_call,
            breaker_clock=self.clock,
            namespace=namespace,
            lookup=lookup,
        )
        [self.lower], [self.tier] = self.under_test.lower, self.under_test.tiers
        self.lower.write_behind.queue_blocks = queue  # may exceed a quarter of this small L1
        self.open_leases: list[Lease] = []
        self.asked = self.filled = 0  # blocks of L1
        self.clears = 0
        self.threads = self.lower.channel.workers.threads
        logging.getLogger("kvcache").setLevel("CRITICAL")  # silences the circuit breaker

    @staticmethod
    def keys(chain: str) -> list[bytes]:
        return [chain[: at + 1].encode() for at in range(len(chain))]

    @rule(fault=faults)
    def set_tier_fault(self, fault: str) -> None:
        self.tier.fault = fault

    @rule(
        verb=st.sampled_from(["access", "admit", "add", "remove", "evict"]),
        name=st.sampled_from(sorted(EXCEPTIONS.keys() - {"KeyboardInterrupt"})),
    )
    def set_policy_fault(self, verb: str, name: str) -> None:
        def fail(*_: object) -> None:
            done["policy faults"] += 1
            error = EXCEPTIONS[name]()
            raise error

        replace_policy_method(self.under_test.front, verb, fail)

    @rule(chain=chains, skip=st.integers(0, 5))
    def put(self, chain: str, skip: int) -> None:
        keys = self.keys(chain)
        at = min(skip, len(keys) - 1)
        self.filled += self.under_test.put(keys[at:], keys[at - 1] if at else None)

    @rule(target=reading, chain=chains, start=st.integers(0, 5))
    def fetch(self, chain: str, start: int) -> Lease:
        start = min(start, len(chain))
        self.asked += len(chain) - start
        lease = self.under_test.fetch(self.keys(chain), start)
        self.open_leases.append(lease)
        return lease

    @rule(lease=consumes(reading), failed=st.booleans())
    def end(self, lease: Lease, failed: bool) -> None:
        self.open_leases.remove(lease)
        lease.end(lease.keys[:1] if failed else ())

    @rule(chain=chains)
    def prefetch(self, chain: str) -> None:
        if (prefetched := self.under_test.stack.prefetch(self.keys(chain))) is not None:
            prefetched.result(LONG)

    @rule(chain=chains, fault=faults)
    def store_clear_l1_and_fetch(self, chain: str, fault: str) -> None:
        self.tier.fault = ""
        self.end_breaker_pause()
        self.filled += self.under_test.put(self.keys(chain))
        assert self.under_test.stack.flush(LONG)
        self.under_test.front.clear()
        self.under_test.overwrite_free_slots()
        self.tier.fault = fault
        self.asked += len(chain)
        self.under_test.fetch(self.keys(chain)).end()

    @rule()
    def clear(self) -> None:
        self.clears += 1
        self.under_test.stack.clear()

    @rule()
    def end_breaker_pause(self) -> None:
        self.clock.advance(LONGEST_PAUSE_S)

    @invariant()
    def l1_is_consistent(self) -> None:
        if hasattr(self, "under_test"):
            done["operations"] += 1
            self.under_test.check_index()

    def teardown(self) -> None:
        logging.getLogger("kvcache").setLevel("NOTSET")
        if not hasattr(self, "under_test"):
            return
        self.tier.fault = ""
        for lease in self.open_leases:
            lease.end()
        assert self.under_test.stack.flush(LONG)
        self.under_test.check_invariants()
        stats = self.under_test.stack.stats()
        [l1], [l2] = stats.tiers, stats.lower
        accounted = l2.stored_blocks + l2.known_blocks + l2.declined_blocks + l2.dropped_blocks
        assert accounted == l1.stored_blocks - l2.loaded_blocks
        assert l1.stored_blocks == self.filled + l2.loaded_blocks
        assert l1.lookup_blocks == self.asked
        # A write that begins during the first reset fails before it calls the tier.
        assert self.tier.failed <= l2.errors <= self.tier.failed + self.clears
        if self.lower.channel.assumes_held:
            assert l2.lookup_blocks == self.tier.requested_blocks
            assert (l2.hit_blocks, l2.missed_blocks) == (l2.loaded_blocks, 0)
        else:
            assert l2.loaded_blocks + l2.missed_blocks == self.tier.requested_blocks
        assert all(thread.is_alive() for thread in self.threads)
        done["tier faults"] += self.tier.failed
        self.under_test.stack.close()


Faults.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None)
TestFaults = Faults.TestCase
