"""A stack over lower tiers that do what they are told, for tests of what is between."""

import time
from collections.abc import Callable
from typing import Any

from kvcache import Lease, Match, Stack
from kvcache.lower.tier import LowerTier
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of
from kvcache.tiers.dram import DramTier
from tests.support.failing_parts import Faulty

SPACE = b"n" * 32
LONG = 20.0  # what a test waits at most for what does come


class StackUnderTest:
    """A stack of L1 and lower tiers that do what they are told."""

    def __init__(
        self,
        slots: int = 16,
        tiers: int = 1,
        deadline_s: float = LONG,
        pieces: int = 4,
        calls: int = 2,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ):
        self.front = DramTier(block_nbytes=PAGE, capacity=Size(slots * PAGE))
        self.tiers = [Faulty() for _ in range(tiers)]
        self.lower = [
            LowerTier(
                tier,
                name=f"l{at}",
                front=self.front,
                namespace=SPACE,
                deadline_s=deadline_s,
                calls=calls,
                clock=clock,
                **options,
            )
            for at, tier in enumerate(self.tiers, 2)
        ]
        for lower in self.lower:
            lower.channel.blocks_per_call = pieces
        self.stack = Stack(self.front, self.lower, profile="test", clock=clock)

    def put(self, keys: list[bytes], parent: bytes | None = None) -> int:
        with self.stack.reserve(keys, parent) as lease:
            for key, view in zip(lease.keys, lease.views, strict=True):
                view[:] = block_of(key, PAGE)
            return len(lease)

    def keep_below(self, keys: list[bytes], tier: int = 0) -> None:
        for key in keys:
            self.tiers[tier].held[SPACE + key] = block_of(key, PAGE)

    def fetch(self, keys: list[bytes], start: int = 0) -> Lease:
        match = self.stack.match(keys, start).result(LONG)
        lease = self.stack.fetch(match).result(LONG)
        assert len(lease) <= match.blocks
        assert list(lease.keys) == keys[start : start + len(lease)], "a block under another's key"
        for key, view in zip(lease.keys, lease.views, strict=True):
            assert bytes(view) == block_of(key, PAGE), "wrong bytes"
        return lease

    def hang(self, match: Match) -> None:
        """Fetch until a call hangs in the tier, and whoever waited for it has given up."""
        [lower] = self.lower
        lower.channel.health.breaker._limit = 1 << 30
        before, lower.channel.deadline_s = lower.channel.deadline_s, 0.01
        self.tiers[0].gate.clear()
        while True:
            with self.stack.fetch(match).result(LONG) as lease:
                assert not lease.keys
            if self.tiers[0].waiting.acquire(blocking=False):
                break  # else it was given up before it began
        lower.channel.deadline_s = before

    def got(self, keys: list[bytes], start: int = 0) -> int:
        with self.fetch(keys, start) as lease:
            return len(lease)

    def check(self) -> None:
        self.front._index.check()
        assert self.stack.stats().pinned_slots == 0
