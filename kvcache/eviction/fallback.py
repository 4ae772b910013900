"""The policy that takes over where another one failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from kvcache.eviction.lru import Lru
from kvcache.eviction.policy import Policy
from kvcache.guards.calls import describe_error, raised_by_signal

log = logging.getLogger(__name__)

Chains = Iterable[tuple[Sequence[bytes], bytes | None]]
"""Stretches of chains, the oldest first: their keys, and the key that each of them continues."""

Fallback = Callable[[Policy, BaseException, int, Chains, float], Policy]
"""Given a policy that failed, its exception, slots, what is held and the time, makes another."""


def lru(failed: Policy, error: BaseException, slots: int, held: Chains, now: float) -> Policy:
    """LRU over the blocks that are held. Logs why, unless a signal interrupted the policy."""
    if not raised_by_signal(error):
        log.error(
            "kvcache: eviction policy %s: failed (%s: %s); blocks leave by LRU from now on",
            type(failed).__name__,
            *describe_error(error),
            exc_info=error,
        )
    policy = Lru(max(1, slots))
    for keys, parent in held:
        policy.add(keys, parent, now)
    return policy
