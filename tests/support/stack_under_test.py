"""A stack over lower tiers that fail or hang on command, and checks of what it returns."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from kvcache import Lease, Match, Stack
from kvcache.lower.circuit_breaker import CircuitBreaker
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import FaultyTier

NAMESPACE = b"n" * 32
NEVER = 1 << 30
"""A number of failures that no test reaches."""

LONG = 20.0
"""The most seconds that a test waits for an event that happens."""


class StackUnderTest:
    """A stack of L1 and lower tiers "l2", "l3" and so on.

    Args:
        slots: of L1, one page each.
        tiers: how many lower tiers, or the tiers.
        deadline_s: of each lower tier.
        blocks_per_call: the most blocks of one call to a lower tier.
        calls: how many calls to a lower tier run at once.
        clock: of the stack and of the lower tiers.
        breaker_clock: of the circuit breakers; ``None`` is ``clock``.
        breaker_failures: how many failures in a row open the circuit breaker of a lower tier.
        namespace: of the blocks in the lower tiers.
        announce_front: whether L1 is announced in events.
        options: of every lower tier.
    """

    def __init__(
        self,
        slots: int = 16,
        tiers: int | Sequence[FaultyTier] = 1,
        deadline_s: float = LONG,
        blocks_per_call: int = 4,
        calls: int = 2,
        clock: Callable[[], float] = time.monotonic,
        breaker_clock: Callable[[], float] | None = None,
        breaker_failures: int = 3,
        namespace: bytes = NAMESPACE,
        announce_front: bool = True,
        **options: Any,
    ):
        self.front = DramTier(block_nbytes=PAGE, capacity=Size(slots * PAGE))
        self.tiers = [FaultyTier() for _ in range(tiers)] if isinstance(tiers, int) else list(tiers)
        self.lower = [
            LowerTier(
                tier,
                name=f"l{number}",
                front=self.front,
                namespace=namespace,
                deadline_s=deadline_s,
                calls=calls,
                clock=clock,
                piece_nbytes=blocks_per_call * PAGE,
                breaker=CircuitBreaker(breaker_clock or clock, failures=breaker_failures),
                **options,
            )
            for number, tier in enumerate(self.tiers, 2)
        ]
        self.stack = Stack(
            self.front, self.lower, profile="test", announce=announce_front, clock=clock
        )

    def put(self, keys: list[bytes], parent: bytes | None = None) -> int:
        """Store the blocks that L1 lacks, as an engine does; return how many."""
        with self.stack.reserve(keys, parent) as lease:
            for key, view in zip(lease.keys, lease.views, strict=True):
                view[:] = block_of(key, PAGE)
            return len(lease)

    def put_in_tier(self, keys: list[bytes], tier: int = 0) -> None:
        """Place the blocks in a lower tier, without the stack."""
        for key in keys:
            self.tiers[tier].held[NAMESPACE + key] = block_of(key, PAGE)

    def fetch(self, keys: list[bytes], start: int = 0) -> Lease:
        """Match and fetch ``keys[start:]``, and check the bytes of every block."""
        match = self.stack.match(keys, start).result(LONG)
        lease = self.stack.fetch(match).result(LONG)
        assert len(lease) <= match.blocks
        assert list(lease.keys) == keys[start : start + len(lease)], "a block under another's key"
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert bytes(view) == block_of(key, PAGE), "wrong bytes"
        return lease

    def fetch_count(self, keys: list[bytes], start: int = 0) -> int:
        """Fetch, end the lease, and return how many blocks it had."""
        with self.fetch(keys, start) as lease:
            return len(lease)

    def hang_load(self, match: Match) -> None:
        """Fetch until a load hangs in the tier and its deadline has passed.

        The stack needs ``breaker_failures=NEVER``, because each fetch may miss its deadline.
        """
        [lower] = self.lower
        deadline_s, lower.channel.deadline_s = lower.channel.deadline_s, 0.01
        self.tiers[0].gate.clear()
        while True:
            with self.stack.fetch(match).result(LONG) as lease:
                assert not lease.keys
            if self.tiers[0].waiting.acquire(blocking=False):
                break  # otherwise the deadline passed before the load began
        lower.channel.deadline_s = deadline_s

    def overwrite_free_slots(self) -> None:
        """Fill L1's free slots with bytes of no block, so that a slot that is not read shows."""
        keys = [b"overwritten %d" % number for number in range(self.front.slab.slots)]
        with self.front.reserve(keys) as lease:
            for view in lease.views:
                view[:] = b"\xee" * len(view)
            lease.end(failed=lease.keys)

    def check_index(self) -> None:
        """Check that L1's index is consistent. Other threads may be using it."""
        with self.front.lock:
            self.front.index.check()

    def check_invariants(self) -> None:
        """Check that L1's index is consistent and that no slot is pinned."""
        self.check_index()
        assert self.stack.stats().pinned_slots == 0
