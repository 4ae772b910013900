"""Direct tiers that fail or hang on command, and an engine that reuses its memory at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvcache.lower.circuit_breaker import CircuitBreaker
from kvcache.lower.direct import DirectTiers
from kvcache.lower.direct_tier import DirectTier
from kvcache.slab import PAGE
from kvcache.testing import block_of
from kvcache.tier import Tier
from kvcache.tiers.framed import Framed
from kvcache.worker_pool import STORE
from tests.support.failing_parts import FaultyTier
from tests.support.stack_under_test import LONG, NAMESPACE

REUSED = 0x5E
"""The byte that the engine writes over its memory when a call has returned."""


class DirectUnderTest:
    """Direct tiers "t1", "t2" and so on, and the memory of an engine.

    Args:
        tiers: how many tiers, or the tiers.
        deadline_s: of each tier.
        blocks_per_call: the most blocks of one call to a tier.
        frames: how many blocks ``Framed`` passes to the tier inside at once.
        calls: how many calls to a tier run at once.
        clock: of the tiers.
        breaker_clock: of the circuit breakers; ``None`` is ``clock``.
        breaker_failures: how many failures in a row open the circuit breaker of a tier.
        options: of every tier.
    """

    def __init__(
        self,
        tiers: int | Sequence[Tier] = 1,
        deadline_s: float = LONG,
        blocks_per_call: int = 4,
        frames: int = 4,
        calls: int = 2,
        clock: Callable[[], float] = time.monotonic,
        breaker_clock: Callable[[], float] | None = None,
        breaker_failures: int = 3,
        **options: Any,
    ) -> None:
        found = [FaultyTier() for _ in range(tiers)] if isinstance(tiers, int) else list(tiers)
        self.tiers: list[Any] = found
        for tier in found:
            tier.call_nbytes = frames * PAGE
        self.direct = DirectTiers(
            [
                DirectTier(
                    Framed(tier, block_nbytes=PAGE),
                    name=f"t{number}",
                    namespace=NAMESPACE,
                    block_nbytes=PAGE,
                    deadline_s=deadline_s,
                    calls=calls,
                    clock=clock,
                    piece_nbytes=blocks_per_call * PAGE,
                    breaker=CircuitBreaker(breaker_clock or clock, failures=breaker_failures),
                    **options,
                )
                for number, tier in enumerate(found, 1)
            ],
            profile="test",
            block_nbytes=PAGE,
        )
        self._reused: list[bytearray] = []

    def put(self, keys: Sequence[bytes], parent: bytes | None = None) -> list[bool]:
        """Store the blocks, and reuse their memory."""
        buffers = [bytearray(block_of(key, size_of(key))) for key in keys]
        held = self.direct.store(keys, buffers, parent)
        self.reuse(buffers)
        return held

    def get(self, keys: Sequence[bytes]) -> list[bool]:
        """Load the blocks, check the bytes of each, and reuse their memory."""
        buffers = [bytearray(size_of(key)) for key in keys]
        filled = self.direct.load(keys, buffers)
        for key, is_filled, buffer in zip(keys, filled, buffers, strict=True):
            assert not is_filled or buffer == block_of(key, size_of(key)), "wrong bytes"
        self.reuse(buffers)
        return filled

    def reuse(self, buffers: Sequence[bytearray]) -> None:
        """Write over memory that no tier may use any more."""
        for buffer in buffers:
            buffer[:] = bytes([REUSED]) * len(buffer)
        self._reused += buffers

    def check_memory(self) -> None:
        """Check that no tier has written to memory that was reused."""
        assert all(buffer.count(REUSED) == len(buffer) for buffer in self._reused)

    def hang(self, tier: int = 0) -> None:
        """Let every call of a tier hang from now on, until :meth:`resume`."""
        self.tiers[tier].gate.clear()

    def resume(self) -> None:
        """Let the calls that hang continue, and wait until all calls have ended."""
        for tier in self.tiers:
            tier.gate.set()
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until every worker has ended the calls that were queued before."""
        for tier in self.direct.tiers:
            workers = tier.channel.workers
            if tier.channel.closed:
                for thread in workers.threads:
                    thread.join(LONG)
                continue
            all_here = threading.Barrier(len(workers.threads) + 1)

            def arrive(all_here: threading.Barrier = all_here) -> None:
                all_here.wait(LONG)

            for _ in workers.threads:
                workers.add_job(STORE, arrive)
            all_here.wait(LONG)

    def held(self, tier: int = 0) -> set[bytes]:
        """The keys of the blocks that a tier holds under the namespace of the test."""
        names: dict[bytes, bytes] = self.tiers[tier].held
        return {name.removeprefix(NAMESPACE) for name in names}

    def close(self) -> None:
        """Let calls that hang continue, check the memory, and close the tiers."""
        self.resume()
        self.check_memory()
        self.direct.close()


def size_of(key: bytes) -> int:
    """The bytes of the block under ``key``: blocks of direct tiers differ in size."""
    return 1 + int.from_bytes(block_of(key, 2), "big") % PAGE


def stored(keys: Sequence[bytes]) -> dict[bytes, bytes]:
    """What a tier holds after a store of the blocks, by name."""
    under_test = DirectUnderTest()
    under_test.put(keys)
    under_test.close()
    return dict(under_test.tiers[0].held)
