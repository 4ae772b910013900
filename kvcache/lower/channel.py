"""The only way to one lower tier: checked calls, and the state that reads and writes share.

Invariants:

* Only ``Channel`` and its ``TierNamespace`` call the tier's methods. They check what the tier
  returns, and raise ``TierError`` for every failure of the tier.
* After ``close`` no call begins.
* Each counter is increased in one place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Final, Literal

from kvcache import telemetry
from kvcache.events import BlockEvents
from kvcache.guards.calls import answers_per_key, byte_count_reader, result_of
from kvcache.keys import Branch
from kvcache.lower.circuit_breaker import CircuitBreaker, TierHealth
from kvcache.lower.namespace import TierNamespace
from kvcache.lower.remembered import RememberedBlocks
from kvcache.stats import LowerStats, TierName, usage_of
from kvcache.tier import Tier, TierUsage
from kvcache.worker_pool import WorkerPool

USAGE_TIMEOUT_S: Final = 0.5


class Channel:
    """Calls one lower tier.

    Args:
        tier: the tier.
        name: its name in the profile.
        kind: its kind in the profile.
        namespace: the namespace of the blocks.
        about: a JSON object that describes the namespace to people.
        deadline_s: how long a caller waits for one answer.
        blocks_per_call: the most blocks of one call.
        calls: how many calls run in parallel.
        clock: the current time in seconds.
        breaker: the circuit breaker; ``None`` is one with the default settings.
        lookup: whether a lookup asks the tier, or (``"load"``) assumes that the tier holds a block.

    Attributes:
        assumes_held: whether ``lookup`` is ``"load"``.
        remembered: the blocks that the tier held or missed; empty with ``lookup = "ask"``.
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
        breaker: CircuitBreaker | None = None,
        lookup: Literal["ask", "load"] = "ask",
    ) -> None:
        self.tier = tier
        self.assumes_held = lookup == "load"
        self.remembered = RememberedBlocks(clock)
        self.tier_name = TierName(name, kind)
        self.tier_namespace = TierNamespace(tier, namespace, about)
        self.events = BlockEvents()  # notified of the blocks that the tier reports to hold
        self.tier_attributes = {telemetry.TIER: name, telemetry.KIND: kind}
        self.deadline_s = deadline_s
        self.blocks_per_call = blocks_per_call
        self.clock = clock
        self.closed = False
        self.health = TierHealth(
            self.tier_name, self.tier_attributes, breaker or CircuitBreaker(clock)
        )
        self.workers = WorkerPool(name, calls)
        # For ``usage`` and ``close``, which must work while every other worker hangs in a call.
        self.control_worker = WorkerPool(f"{name}-control", 1)
        self._usage = TierUsage()  # the tier's last answer
        self._pending_usage: Future[TierUsage] | None = None
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(LowerStats.__slots__, 0)

    @property
    def namespace(self) -> bytes:
        """The namespace of blocks that are looked up and stored now."""
        return self.tier_namespace.current

    @property
    def accepts_calls(self) -> bool:
        """Whether a call would be made: the channel is open, and the breaker does not refuse."""
        return not (self.health.breaker.refusing or self.closed)

    def add_counts(self, **increments: int) -> None:
        """Add to counters of :class:`LowerStats`, by name."""
        with self._lock:
            for name, increment in increments.items():
                self._counts[name] += increment

    def counts(self) -> dict[str, Any]:
        """Return the counters of :class:`LowerStats` now, by name."""
        health = self.health
        current = {
            "errors": health.errors,
            "breaker_open": health.breaker.open,
            "usage": self.usage(),
        }
        with self._lock:
            return self._counts | current

    def usage(self) -> TierUsage:
        """Return the usage that the tier reports, or its last answer if it does not answer soon."""
        pending = self._pending_usage
        if pending is None or pending.done():
            pending = self.control_worker.submit(usage_of, self.tier)
            self._pending_usage = pending
            wait([pending], USAGE_TIMEOUT_S)
        if pending.done() and not pending.cancelled():
            self._usage = pending.result()
        return self._usage

    # Answers without a call, for ``lookup = "load"``

    def may_hold(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Return whether to load each of ``keys``: not what the tier missed a short time ago."""
        if not self.accepts_calls:
            return [False] * len(keys)
        return self.remembered.may_hold(namespace, keys)

    def known(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Return which of ``keys`` need not be stored, because the tier holds them.

        With ``lookup = "load"`` these are the blocks that this process stored or loaded. Otherwise
        the tier is asked, and this method raises what :meth:`contains` raises.
        """
        if self.assumes_held:
            return self.remembered.holds(namespace, keys)
        return self.contains(namespace, keys)

    # The tier's methods. Each raises TierError for every failure of the tier, and nothing else.

    def contains(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Return, for each of ``keys`` in ``namespace``, whether the tier reports to hold it."""
        names = self.tier_namespace.names(namespace, keys)
        held = answers_per_key(lambda: self.tier.contains(names), len(keys), bool)
        self._notify_observed(namespace, keys, held)
        return held

    def load(
        self, namespace: bytes, keys: Sequence[bytes], into: Sequence[memoryview]
    ) -> list[int]:
        """Read each block into its buffer; return the bytes written per key."""
        names = self.tier_namespace.names(namespace, keys)
        sizes = [len(view) for view in into]  # a late call may find the views released
        reader = byte_count_reader(max(sizes, default=0))
        written = answers_per_key(lambda: self.tier.load(names, into), len(keys), reader)
        self._notify_observed(namespace, keys, [count > 0 for count in written])
        if self.assumes_held:
            whole = [count == size for count, size in zip(written, sizes, strict=True)]
            self.remembered.observe(namespace, keys, whole)
        return written

    def store(
        self, namespace: bytes, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        """Offer the blocks of segments to the tier; return for each whether the tier holds it now.

        ``blocks`` are in the order of the concatenated keys.
        """
        keys = [key for branch, _ in branches for key in branch]
        names = self.tier_namespace.names(namespace, keys)
        parents = [parent for _, parent in branches if parent is not None]
        name_of = dict(zip(parents, self.tier_namespace.names(namespace, parents), strict=True))
        named: list[Branch] = []
        done = 0
        for branch, parent in branches:
            parent_name = None if parent is None else name_of[parent]
            named.append((names[done : done + len(branch)], parent_name))
            done += len(branch)
        if len(named) == 1:
            store = partial(self.tier.store, names, blocks, named[0][1])
        else:
            store = partial(self.tier.store_branches, named, blocks)
        taken = answers_per_key(store, len(keys), bool)
        self._notify_observed(namespace, keys, taken)
        if self.assumes_held:
            self.remembered.observe(namespace, keys, taken)
        return taken

    def _notify_observed(
        self, namespace: bytes, keys: Sequence[bytes], held: Sequence[bool]
    ) -> None:
        """Notify the subscriber which ``keys`` the tier holds, unless a reset replaced them."""
        if namespace == self.namespace:
            self.events.observed(keys, held)

    def reset(self, namespace: bytes | None = None) -> None:
        """Use ``namespace`` from now on; ``None`` is a random one."""
        self.tier_namespace.reset(namespace)
        self.events.cleared()

    def close(self, timeout_s: float) -> None:
        """Make no more calls, and close the tier.

        Running calls have the tier's deadline to end, and at most half of ``timeout_s``. The tier's
        own ``close`` is called even if they have not ended, and may hang.
        """
        self.closed = True
        self.workers.drop_queued()
        self.workers.close(min(self.deadline_s, timeout_s / 2))
        try:
            result_of(self.tier.close)
        finally:
            self._usage = usage_of(self.tier)

    def stop(self) -> None:
        """End the threads without closing the tier."""
        self.workers.close(0.0)
        self.control_worker.close(0.0)
