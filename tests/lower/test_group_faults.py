"""A stack with blocks of several groups over a lower tier that fails, in any order of operations.

The bytes of every lease are compared with those of its keys, and every hit with the blocks that
the definition of its groups needs. ``KVCACHE_MACHINE_EXAMPLES`` sets the number of examples.
"""

import logging
import os
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvcache import Lease
from kvcache.keys import Branch
from kvcache.resume import Needs, Resume
from kvcache.slab import PAGE
from kvcache.testing import block_of
from tests.support.failing_parts import FAULTS, replace_policy_method
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest, check_resume
from tests.support.manual_clock import ManualClock
from tests.support.stack_under_test import LONG, StackUnderTest

EXAMPLES = int(os.environ.get("KVCACHE_MACHINE_EXAMPLES", "120"))
LONGEST_PAUSE_S = 60.0  # of a circuit breaker
MODELS: dict[str, tuple[list[Needs], bool]] = {
    "chain": ([], True),
    "window": ([Needs("window", 7)], True),
    "window, state": ([Needs("window", 5), Needs("state")], True),
    "two windows, chunk": ([Needs("window", 3), Needs("window", 11), Needs("chunk", 8)], True),
    "two chains": ([Needs("all"), Needs("state")], True),
    "window alone": ([Needs("window", 7)], False),
}
blocks = st.integers(0, 6)


class GroupFaults(RuleBasedStateMachine):
    """Stores, hits, hints, resets and faults in any order."""

    reading: Bundle[Lease] = Bundle("reading")
    filling: Bundle[Lease] = Bundle("filling")
    names = st.sampled_from(["a", "b", "c"])

    @initialize(
        slots=st.integers(4, 40),
        model=st.sampled_from(sorted(MODELS)),
        parts=st.integers(1, 2),
        blocks_per_call=st.integers(1, 5),
        queue=st.integers(1, 40),
        writes=st.sampled_from(["all", "hot"]),
        lookup=st.sampled_from(["ask", "load"]),
    )
    def open(
        self,
        slots: int,
        model: str,
        parts: int,
        blocks_per_call: int,
        queue: int,
        writes: str,
        lookup: str,
    ) -> None:
        self.clock = ManualClock()
        self.under_test = StackUnderTest(
            slots=slots,
            blocks_per_call=blocks_per_call,
            breaker_clock=self.clock,
            writes=writes,
            lookup=lookup,
        )
        [self.lower], [self.tier] = self.under_test.lower, self.under_test.tiers
        self.stack = self.under_test.stack
        self.lower.write_behind.queue_blocks = queue
        sides, chain = MODELS[model]
        self.requests = {
            name: GroupedRequest(*sides, parts=parts, name=name, chain=chain, common=2)
            for name in ("a", "b", "c")
        }
        self.open_leases: list[Lease] = []
        self.clears = 0
        logging.getLogger("kvcache").setLevel("CRITICAL")  # silences the circuit breaker

    @rule(fault=st.just("") | st.sampled_from(FAULTS))
    def set_tier_fault(self, fault: str) -> None:
        self.tier.fault = fault

    @rule(verb=st.sampled_from(["access", "admit", "add", "remove", "evict"]))
    def set_policy_fault(self, verb: str) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        replace_policy_method(self.under_test.front, verb, fail)

    @rule(
        target=filling,
        name=names,
        first=blocks,
        count=st.integers(1, 6),
        kept=st.sets(blocks),
        sides_alone=st.booleans(),
    )
    def reserve(
        self, name: str, first: int, count: int, kept: set[int], sides_alone: bool
    ) -> Lease:
        request, end = self.requests[name], min(first + count, 7)
        wanted = sorted(block for block in kept if first <= block < end)
        chains, sides = request.branches(first, end, wanted)
        chains = [] if sides_alone else chains
        lease = self.stack.reserve_branches(chains, sides)
        keys = [key for branch, _ in [*chains, *sides] for key in branch]
        assert [keys[at] for at in lease.positions] == list(lease.keys)
        self.check_parents(lease.keys, sides)
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, PAGE)
        self.open_leases.append(lease)
        return lease

    def check_parents(self, keys: Sequence[bytes], sides: Sequence[Branch]) -> None:
        """Check that each new side block has its chain block in the index."""
        parents = {branch[0]: parent for branch, parent in sides}
        with self.under_test.front.lock:
            known = set(self.under_test.front.index.segments.first_slots)
        for key in keys:
            assert parents.get(key) is None or parents[key] in known, "a side block has no chain"

    @rule(lease=consumes(filling), failed=st.sampled_from(["none", "one", "all"]))
    def end_store(self, lease: Lease, failed: str) -> None:
        self.open_leases.remove(lease)
        lease.end({"none": (), "one": lease.keys[-1:], "all": lease.keys}[failed])

    @rule(target=reading, name=names, own=blocks, top=st.integers(0, 7 * BLOCK_TOKENS))
    def fetch(self, name: str, own: int, top: int) -> Lease:
        request, tokens = self.requests[name], own * BLOCK_TOKENS
        found = self.stack.fetch_resume(request.groups, tokens, top, BLOCK_TOKENS)
        self.check_hit(request, tokens, top, found)
        self.open_leases.append(found.lease)
        return found.lease

    def check_hit(self, request: GroupedRequest, own: int, top: int, found: Resume) -> None:
        contains = self.under_test.front.contains
        ends = range(BLOCK_TOKENS, top + 1, BLOCK_TOKENS)
        usable = [
            end
            for end in ends
            if end > own and (needed := request.needed(own, end)) and all(contains(needed))
        ]
        assert found.tokens == max(usable, default=own)
        expected = request.needed(own, found.tokens) if usable else []
        assert list(found.lease.keys) == expected
        for key, view in zip(found.lease.keys, found.lease.views, strict=True):
            assert view == block_of(key, PAGE), "wrong bytes"

    @rule(lease=consumes(reading), failed=st.booleans())
    def end_load(self, lease: Lease, failed: bool) -> None:
        self.open_leases.remove(lease)
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert view == block_of(key, PAGE), "a pinned block was overwritten"
        lease.end(lease.keys[:1] if failed else ())

    @rule(name=names, top=st.integers(0, 7 * BLOCK_TOKENS))
    def prefetch(self, name: str, top: int) -> None:
        request = self.requests[name]
        future = self.stack.prefetch_resume(request.groups, top, BLOCK_TOKENS)
        if future is not None:
            future.result(LONG)

    @rule(name=names, top=st.integers(BLOCK_TOKENS, 7 * BLOCK_TOKENS))
    def empty_l1_and_prefetch(self, name: str, top: int) -> None:
        self.stack.flush(LONG)
        self.under_test.front.clear()
        self.prefetch(name, top)

    @rule(name=names, tokens=st.integers(0, 30), hint=st.sampled_from(["done", "keep"]))
    def hint(self, name: str, tokens: int, hint: str) -> None:
        groups, keep = self.requests[name].groups, 5.0 if hint == "keep" else 0.0
        self.stack.hint_resume(groups, tokens, done=hint == "done", keep=keep)

    @rule(name=names, group=st.integers(0, 3), block=blocks)
    def drop(self, name: str, group: int, block: int) -> None:
        self.under_test.front.remove([self.requests[name].key(group, block)])

    @rule()
    def clear(self) -> None:
        self.clears += 1
        self.stack.clear()

    @rule()
    def end_breaker_pause(self) -> None:
        self.clock.advance(LONGEST_PAUSE_S)

    @invariant()
    def l1_is_consistent(self) -> None:
        if hasattr(self, "under_test"):
            self.under_test.check_index()

    def teardown(self) -> None:
        logging.getLogger("kvcache").setLevel("NOTSET")
        if not hasattr(self, "under_test"):
            return
        self.tier.fault = ""
        for lease in self.open_leases:
            lease.end(lease.keys)
        for request in self.requests.values():
            check_resume(self.stack, request, 0, 7 * BLOCK_TOKENS)
        assert self.stack.flush(LONG)
        self.under_test.check_invariants()
        stats = self.stack.stats()
        [l2] = stats.lower
        # A write that begins during the first reset fails before it calls the tier.
        assert self.tier.failed <= l2.errors <= self.tier.failed + self.clears
        asked = l2.lookup_blocks if self.lower.channel.assumes_held else l2.missed_blocks
        found = 0 if self.lower.channel.assumes_held else l2.loaded_blocks
        assert found + asked == self.tier.requested_blocks
        self.stack.close()


GroupFaults.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None
)
TestGroupFaults = GroupFaults.TestCase
