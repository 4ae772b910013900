"""The policy that replaces one that raised an exception."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from kvcache.eviction.lru import Lru
from kvcache.eviction.policy import Policy
from kvcache.guards.calls import describe_error, raised_by_signal

log = logging.getLogger(__name__)

Chains = Iterable[tuple[Sequence[bytes], bytes | None]]
"""Segments of chains, oldest first: the keys and the parent of each."""

Fallback = Callable[[Policy, BaseException, int, Chains, float], Policy]
"""Returns the replacement. Its arguments are the failed policy, its exception, the number of slots,
the held segments and the time."""


def lru(failed: Policy, error: BaseException, slots: int, held: Chains, now: float) -> Policy:
    """Return an LRU policy over the held blocks; logs the failure unless a signal caused it."""
    if not raised_by_signal(error):
        log.error(
            "kvcache: eviction policy %s: failed (%s: %s); using LRU until the tier is reopened",
            type(failed).__name__,
            *describe_error(error),
            exc_info=error,
        )
    policy = Lru(max(1, slots))
    for keys, parent in held:
        policy.add(keys, parent, now)
    return policy
