"""Guards the eviction policy of an index: a policy that fails is replaced.

A policy may be any class. If it raises or returns a wrong result, no slot is lost, and ``fallback``
makes a replacement from the READY blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import index as as_integer
from typing import Any

from kvcache.eviction import Policy
from kvcache.eviction.fallback import Fallback
from kvcache.eviction_pass import EvictionPass
from kvcache.guards.calls import raised_by_signal
from kvcache.keys import Branch, Keys
from kvcache.segments import SegmentTable


class GuardedPolicy:
    """Calls a policy, and replaces it when it fails.

    Args:
        policy: the policy.
        clock: returns seconds for the policy; never goes back.
        fallback: makes the policy that replaces a failed one; without it, exceptions are raised.
        segments: all blocks of the index.

    Attributes:
        policy: the policy in use.
        slots: how many slots the index has.
    """

    def __init__(
        self,
        policy: Policy,
        clock: Callable[[], float],
        fallback: Fallback | None,
        segments: SegmentTable,
    ) -> None:
        self.policy = policy
        self.slots = 0
        self._clock = clock
        self._fallback = fallback
        self._segments = segments

    def access(self, chain: Keys, held: int) -> None:
        """Report a request for ``chain``, of which the first ``held`` blocks are READY."""
        try:
            self.policy.access(chain, held, self._clock())
        except BaseException as error:  # noqa: BLE001
            self._replace(error)

    def announce(self, sides: Sequence[Branch]) -> None:
        """Announce a store of these side blocks, if there are any."""
        try:
            if sides:
                self.policy.expect_sides()
        except BaseException as error:  # noqa: BLE001
            self._replace(error)

    def admit(self, new: Keys, parent: bytes | None) -> int:
        """Return how many of the leading ``new`` blocks the policy admits."""
        policy: Any = self.policy  # may return any type
        try:
            return max(0, min(len(new), as_integer(policy.admit(new, parent, self._clock()))))
        except BaseException as error:  # noqa: BLE001
            self._replace(error)
            return len(new)

    def evict(self, eviction: EvictionPass) -> None:
        """Let the policy offer blocks until enough are evicted or no more can be."""
        try:
            self.policy.evict(eviction.need, eviction.take)
        except BaseException as error:  # noqa: BLE001
            self._replace(error)
            self.policy.evict(eviction.need, eviction.take)

    def report_added(self, chains: Iterable[Branch]) -> None:
        """Report blocks that became READY."""
        now = self._clock()
        try:
            for keys, parent in chains:
                self.policy.add(keys, parent, now)
        except BaseException as error:  # noqa: BLE001
            self._replace(error)

    def report_removed(self, keys: Sequence[bytes]) -> None:
        """Report blocks that were removed, but not evicted."""
        try:
            self.policy.remove(keys)
        except BaseException as error:  # noqa: BLE001
            self._replace(error)

    def _replace(self, error: BaseException) -> None:
        """Replace the policy after it raised ``error``: its state is unreliable.

        Raises ``error`` if a signal caused it, or if there is no fallback.
        """
        if self._fallback is None:
            raise error
        segments = self._segments.by_first_slot.values()
        held = [(each.keys, each.parent) for each in segments if each.ready]
        self.policy = self._fallback(self.policy, error, self.slots, held, self._clock())
        if raised_by_signal(error):
            raise error
