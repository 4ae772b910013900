"""One lower tier, and on what terms it is called: what asking it and writing to it share.

Always true here: after ``close`` nobody asks, what is counted is counted once, and no method of the
tier is called but by the methods here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Final

from kvcache import telemetry
from kvcache.events import BlockEvents
from kvcache.guards.calls import answers_per_key, byte_count_reader, result_of
from kvcache.lower.circuit_breaker import Health
from kvcache.lower.namespace import Namespace
from kvcache.lower.worker_pool import WorkerPool
from kvcache.stats import LowerStats, TierName, usage_of
from kvcache.tier import Tier, TierUsage

USAGE_S: Final = 0.5  # to wait for a tier's usage


class Channel:
    """The way to a tier.

    Args:
        tier: what holds the bytes.
        name: its name in the profile.
        kind: what the profile calls its class.
        space: the namespace of the blocks.
        about: says for people what the namespace is, as JSON.
        deadline_s: what is waited for one answer.
        blocks_per_call: at most.
        calls: under way at once.
        clock: seconds.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        name: str,
        kind: str,
        namespace: bytes,
        about: str,
        deadline_s: float,
        blocks_per_call: int,
        calls: int,
        clock: Callable[[], float],
    ) -> None:
        self.tier = tier
        self.named = TierName(name, kind)
        self.spaces = Namespace(tier, namespace, about)
        self.events = BlockEvents()  # told what the tier holds, as far as it says
        self.whose = {telemetry.TIER: name, telemetry.KIND: kind}
        self.deadline_s = deadline_s
        self.blocks_per_call = blocks_per_call
        self.clock = clock
        self.closed = False
        self.health = Health(self.named, self.whose, clock)
        self.calls = WorkerPool(name, calls)
        # For what may be asked, or has to be done, while all calls hang: its usage, and its close.
        self.aside = WorkerPool(f"{name}-aside", 1)
        self._usage = TierUsage()  # as of the last time that the tier answered
        self._asked_usage: Future[TierUsage] | None = None
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(LowerStats.__slots__, 0)

    @property
    def namespace(self) -> bytes:
        """The namespace of what is asked for and stored now."""
        return self.spaces.namespace

    @property
    def asleep(self) -> bool:
        """Whether asking would be answered with nothing at once, since the breaker is open."""
        return self.health.breaker.idle

    def count(self, **more: int) -> None:
        """Add to counts of :class:`LowerStats`, by their names."""
        with self._lock:
            for name, by in more.items():
                self._counts[name] += by

    def counts(self) -> dict[str, Any]:
        """The counts at this moment."""
        health = self.health
        now = {"errors": health.errors, "breaker_open": health.breaker.open, "usage": self.usage()}
        with self._lock:
            return self._counts | now

    def usage(self) -> TierUsage:
        """What the tier says of itself; what it said last where it does not answer at once."""
        asked = self._asked_usage
        if asked is None or asked.done():
            self._asked_usage = asked = self.aside.submit(usage_of, self.tier)
            wait([asked], USAGE_S)
        if asked.done() and not asked.cancelled():
            self._usage = asked.result()
        return self._usage

    # The tier's methods. Each raises TierError for whatever the tier does wrong, and nothing else.

    def contains(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Whether the tier says that it holds each of ``keys``, of the namespace ``namespace``."""
        names = self.spaces.names(namespace, keys)
        held = answers_per_key(lambda: self.tier.contains(names), len(keys), bool)
        self._said(namespace, keys, held)
        return held

    def load(
        self, namespace: bytes, keys: Sequence[bytes], into: Sequence[memoryview]
    ) -> list[int]:
        """Read each block into its buffer, all of one size; the bytes written per key."""
        names = self.spaces.names(namespace, keys)
        room = len(into[0]) if into else 0
        written = answers_per_key(
            lambda: self.tier.load(names, into), len(keys), byte_count_reader(room)
        )
        self._said(namespace, keys, [nbytes > 0 for nbytes in written])
        return written

    def store(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        blocks: Sequence[memoryview],
        parent: bytes | None,
    ) -> list[bool]:
        """Offer blocks, the first of which continues ``parent``; whether each was taken."""
        names = self.spaces.names(namespace, keys)
        before = parent and self.spaces.names(namespace, [parent])[0]
        taken = answers_per_key(lambda: self.tier.store(names, blocks, before), len(keys), bool)
        self._said(namespace, keys, taken)
        return taken

    def _said(self, namespace: bytes, keys: Sequence[bytes], held: Sequence[bool]) -> None:
        """The tier said of ``keys`` whether it holds them, when the namespace was ``namespace``."""
        if namespace == self.namespace:
            self.events.observed(keys, held)

    def clear(self) -> None:
        """Take a namespace that no other stack has."""
        self.spaces.clear()
        self.events.cleared()

    def close(self, timeout_s: float) -> None:
        """Call the tier no more, and close it.

        Calls under way have the tier's deadline to end, and no more than half of ``timeout_s``; the
        tier's own ``close`` is called also when they have not ended, and may hang.
        """
        self.closed = True
        self.calls.drop_waiting()
        self.calls.close(min(self.deadline_s, timeout_s / 2))
        try:
            result_of(self.tier.close)
        finally:
            self._usage = usage_of(self.tier)

    def stop(self) -> None:
        """End the threads; the tier stays open."""
        self.calls.close(0.0)
        self.aside.close(0.0)
