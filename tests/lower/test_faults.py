"""A whole stack over a tier that goes wrong in every way, against what was really stored.

``KVCACHE_MACHINE_EXAMPLES`` has it go on for longer: 25,000 examples are a million operations.
"""

import logging
import os
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvcache import Lease
from tests.support.failing_parts import FAULTS, goes_wrong
from tests.support.odd_answers import RAISED
from tests.support.stack_under_test import LONG, StackUnderTest

EXAMPLES = int(os.environ.get("KVCACHE_MACHINE_EXAMPLES", "120"))
faults = st.just("") | st.sampled_from(FAULTS)
done: Counter[str] = Counter()  # in this process


class Faults(RuleBasedStateMachine):
    """The whole stack over a tier that goes wrong in every way, against what was really stored."""

    reading: Bundle[Lease] = Bundle("reading")
    chains = st.sampled_from(["0", "00", "000", "00000", "001", "00111", "1", "11"])

    @initialize(slots=st.integers(1, 10), pieces=st.integers(1, 4), queue=st.integers(1, 10))
    def open(self, slots: int, pieces: int, queue: int) -> None:
        self.below = StackUnderTest(slots=slots, blocks_per_call=pieces)
        self.below.lower[
            0
        ].write_behind.queue_blocks = queue  # more than a stack so small would have
        self.out: list[Lease] = []
        self.asked = self.filled = 0  # blocks of L1
        self.threads = [t for lower in self.below.lower for t in lower.channel.workers.threads]
        logging.getLogger("kvcache").setLevel("CRITICAL")  # or a breaker that opens is logged

    @staticmethod
    def keys(chain: str) -> list[bytes]:
        return [chain[: at + 1].encode() for at in range(len(chain))]

    @rule(fault=faults)
    def goes_wrong(self, fault: str) -> None:
        self.below.tiers[0].fault = fault

    @rule(
        verb=st.sampled_from(["access", "admit", "add", "remove", "evict"]),
        name=st.sampled_from(sorted(RAISED.keys() - {"KeyboardInterrupt"})),
    )
    def policy_goes_wrong(self, verb: str, name: str) -> None:
        def wrong(*_: object) -> None:
            done["policy faults"] += 1
            error = RAISED[name]()
            raise error

        goes_wrong(self.below.front, verb, wrong)

    @rule(chain=chains, skip=st.integers(0, 5))
    def put(self, chain: str, skip: int) -> None:
        keys = self.keys(chain)
        at = min(skip, len(keys) - 1)
        self.filled += self.below.put(keys[at:], keys[at - 1] if at else None)

    @rule(target=reading, chain=chains, start=st.integers(0, 5))
    def fetch(self, chain: str, start: int) -> Lease:
        start = min(start, len(chain))
        self.asked += len(chain) - start
        lease = self.below.fetch(self.keys(chain), start)
        self.out.append(lease)
        return lease

    @rule(lease=consumes(reading), failed=st.booleans())
    def end(self, lease: Lease, failed: bool) -> None:
        self.out.remove(lease)
        lease.end(lease.keys[:1] if failed else ())

    @rule(chain=chains)
    def prefetch(self, chain: str) -> None:
        if (coming := self.below.stack.prefetch(self.keys(chain))) is not None:
            coming.result(LONG)

    @rule(chain=chains, fault=faults)
    def stored_and_lost_and_asked_for(self, chain: str, fault: str) -> None:
        self.below.tiers[0].fault = ""
        self.pause_ends()
        self.filled += self.below.put(self.keys(chain))
        assert self.below.stack.flush(LONG)
        front = self.below.front
        front.clear()
        for slot in front._index._free:  # or what is not read would be there from before
            front.slab.view(slot)[:] = b"\xee" * len(front.slab.view(slot))
        self.below.tiers[0].fault = fault
        self.asked += len(chain)
        self.below.fetch(self.keys(chain)).end()

    @rule()
    def clear(self) -> None:
        self.below.stack.clear()

    @rule()
    def pause_ends(self) -> None:
        self.below.lower[0].channel.health.breaker._retry_at = 0.0

    @invariant()
    def l1_is_whole(self) -> None:
        if hasattr(self, "below"):
            done["operations"] += 1
            with self.below.front._lock:  # a thread may be writing
                self.below.front._index.check()

    def teardown(self) -> None:
        logging.getLogger("kvcache").setLevel("NOTSET")
        if not hasattr(self, "below"):
            return
        self.below.tiers[0].fault = ""
        for lease in self.out:
            lease.end()
        assert self.below.stack.flush(LONG)
        self.below.check_invariants()
        stats = self.below.stack.stats()
        down = stats.lower[0]
        ways = down.stored_blocks + down.known_blocks + down.declined_blocks + down.dropped_blocks
        assert ways == stats.tiers[0].stored_blocks - down.loaded_blocks
        assert stats.tiers[0].stored_blocks == self.filled + down.loaded_blocks
        assert stats.tiers[0].lookup_blocks == self.asked
        tier = self.below.tiers[0]
        assert down.errors == tier.failed
        assert down.loaded_blocks + down.missed_blocks == tier.asked_blocks
        assert all(thread.is_alive() for thread in self.threads)
        done["tier faults"] += tier.failed
        self.below.stack.close()


Faults.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None)
TestFaults = Faults.TestCase
