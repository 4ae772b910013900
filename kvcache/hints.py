"""Hints of callers about the future use of blocks: done with them, or protect them for a while.

Invariants:

* A hint changes the order of evictions and nothing else. It is no promise, and a hint on a block
  that is not held has no effect.
* ``mark_done`` speaks for one caller: the mark ends when the block is used again. A marked block
  stays while it has a child or is under lease.
* At most one slot in ``SLOTS_PER_PROTECTED_BLOCK`` is protected at a time. Further blocks are
  refused and counted. When nothing else can be evicted, protected blocks are evicted too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

SLOTS_PER_PROTECTED_BLOCK = 4

_MAX_SKIPPED = 64  # a search for victims ends after this many blocks that must stay


def check_hint(*, done: bool, keep: float, soon: bool) -> None:
    """Raise ``ValueError`` for hints that contradict each other, or an impossible time."""
    if not 0 <= keep < float("inf"):
        raise ValueError(f"keep is {keep}; it must be a number of seconds, 0 or more")
    if done and (keep or soon):
        raise ValueError("done excludes keep and soon")


class Hints:
    """The hints on the blocks of one index. The index reports which blocks are used or removed.

    Attributes:
        refused_blocks: how many blocks were not protected because the share was used up.
    """

    def __init__(self) -> None:
        self._done: OrderedDict[bytes, None] = OrderedDict()  # the next victim first
        self._protected: dict[bytes, float] = {}  # the time at which the protection ends
        self.refused_blocks = 0

    def __bool__(self) -> bool:
        return bool(self._done or self._protected)

    @property
    def done_keys(self) -> frozenset[bytes]:
        """The keys that are marked done."""
        return frozenset(self._done)

    @property
    def protected_keys(self) -> frozenset[bytes]:
        """The keys that are protected, expired protections included."""
        return frozenset(self._protected)

    def mark_done(self, keys: Sequence[bytes]) -> None:
        """Mark ``keys``, a segment of a chain, as not needed any more by this caller."""
        for key in reversed(keys):
            self._protected.pop(key, None)
            self._done[key] = None

    def protect(self, keys: Sequence[bytes], until: float, now: float, slots: int) -> None:
        """Protect ``keys`` until a time, as many as fit the share of ``slots``."""
        protected, limit = self._protected, slots // SLOTS_PER_PROTECTED_BLOCK
        if len(protected) + len(keys) > limit:
            for key in [key for key, end in protected.items() if end <= now]:
                del protected[key]
        for key in keys:
            self._done.pop(key, None)
            if key in protected or len(protected) < limit:
                protected[key] = max(until, protected.get(key, until))
            else:
                self.refused_blocks += 1

    def clear_done(self, keys: Sequence[bytes]) -> None:
        """Remove the done mark of ``keys``, which are used again."""
        if self._done:
            for key in keys:
                self._done.pop(key, None)

    def discard(self, keys: Iterable[bytes]) -> None:
        """Forget all hints on ``keys``, which are no longer held."""
        if self:
            for key in keys:
                self._done.pop(key, None)
                self._protected.pop(key, None)

    @property
    def any_protected(self) -> bool:
        """Whether any block is protected, expired protections included."""
        return bool(self._protected)

    def is_protected(self, key: bytes, now: float) -> bool:
        """Whether other blocks are to be evicted before this one."""
        return self._protected.get(key, now) > now

    def victims(self, must_stay: Callable[[bytes], bool]) -> Iterator[bytes]:
        """Yield the done keys for which ``must_stay`` returns ``False``, and forget each.

        A key that must stay has a child or is under a lease. It moves to the end of the order and
        is asked about again by a later search.
        """
        done, skipped = self._done, 0
        while skipped < min(_MAX_SKIPPED, len(done)):
            key = next(iter(done))
            if must_stay(key):
                done.move_to_end(key)
                skipped += 1
            else:
                del done[key]
                yield key
