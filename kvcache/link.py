"""One lower tier, and on what terms it is called: what asking it and writing to it share.

Always true here: after ``close`` nobody asks, and what is counted is counted once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvcache import telemetry
from kvcache.calls import Calls
from kvcache.changes import Changes
from kvcache.health import Health
from kvcache.keys import DIGEST_NBYTES
from kvcache.stats import LowerStats, TierName, usage_of
from kvcache.tier import Tier


class Link:
    """The way to a tier.

    Args:
        tier: what holds the bytes.
        name: its name in the profile.
        kind: what the profile calls its class.
        space: the namespace of the blocks.
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
        space: bytes,
        deadline_s: float,
        blocks_per_call: int,
        calls: int,
        clock: Callable[[], float],
    ) -> None:
        self.tier = tier
        self.named = TierName(name, kind)
        self.space = space
        self.changes = Changes()  # told what the tier holds, as far as it says
        self.whose = {telemetry.TIER: name, telemetry.KIND: kind}
        self.deadline_s = deadline_s
        self.blocks_per_call = blocks_per_call
        self.clock = clock
        self.closed = False
        self.health = Health(self.named, self.whose, clock)
        self.calls = Calls(name, calls)
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(LowerStats.__slots__, 0)

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
        now = {"errors": health.errors, "breaker_open": health.breaker.open}
        with self._lock:
            return self._counts | now | {"usage": usage_of(self.tier)}

    def said(self, space: bytes, keys: Sequence[bytes], held: Sequence[object]) -> None:
        """The tier said of ``keys`` whether it holds them, when the namespace was ``space``."""
        if space == self.space:
            self.changes.held(keys, held)

    def clear(self) -> None:
        """Take a namespace that nobody else has."""
        self.space = os.urandom(len(self.space) or DIGEST_NBYTES)
        self.changes.cleared()

    def close(self) -> None:
        """Call the tier no more, but for what is under way; close it."""
        self.closed = True
        self.calls.do_writes_here()  # they drop what they have
        self.calls.close(self.deadline_s)
        self.tier.close()
