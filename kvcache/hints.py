"""What callers say of blocks beforehand: that they are done with them, or want them kept a while.

Always true here:

* A hint orders evictions and nothing else: it is no promise, and of blocks that are not held it
  says nothing.
* Who is done with a block speaks for himself: if it is used after that, or another one continues
  it, it is like any other.
* At most a share of the slots is kept at a time; what is more is refused, and counted. Where there
  is nothing else to evict, what is kept goes as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

KEPT_SHARE = 4  # one in so many slots may be kept

_PASSED = 64  # keys in a row that have to stay: enough asked for this time


class Hints:
    """Hints on the blocks of one index, which tells what is used and what leaves."""

    def __init__(self) -> None:
        self._done: OrderedDict[bytes, None] = OrderedDict()  # the first to go first
        self._kept: dict[bytes, float] = {}  # until when
        self.refused_blocks = 0

    def __bool__(self) -> bool:
        return bool(self._done or self._kept)

    def mark_done(self, keys: Sequence[bytes]) -> None:
        """``keys``, a stretch of a chain, will not be used again by who says so."""
        for key in reversed(keys):
            self._kept.pop(key, None)
            self._done[key] = None

    def protect(self, keys: Sequence[bytes], until: float, now: float, slots: int) -> None:
        """Rather have others go than ``keys``, of as many as there is room for among ``slots``."""
        kept = self._kept
        if len(kept) + len(keys) > slots // KEPT_SHARE:
            for key in [key for key, end in kept.items() if end <= now]:
                del kept[key]
        for key in keys:
            self._done.pop(key, None)
            if key in kept or len(kept) < slots // KEPT_SHARE:
                kept[key] = max(until, kept.get(key, until))
            else:
                self.refused_blocks += 1

    def used(self, keys: Sequence[bytes]) -> None:
        """``keys`` are asked for: nobody is done with them."""
        if self._done:
            for key in keys:
                self._done.pop(key, None)

    def left(self, keys: Iterable[bytes]) -> None:
        """``keys`` are held no more."""
        if self:
            for key in keys:
                self._done.pop(key, None)
                self._kept.pop(key, None)

    @property
    def any_kept(self) -> bool:
        """Whether anything may have been asked to be kept."""
        return bool(self._kept)

    def is_kept(self, key: bytes, now: float) -> bool:
        """Whether others should go before it."""
        return self._kept.get(key, now) > now

    def victims(self, keep: Callable[[bytes], bool]) -> Iterator[bytes]:
        """The keys that somebody is done with, none for which ``protect(key)``.

        Such a key is another's too, or under a lease that will end: it is asked about again later.
        """
        done, passed = self._done, 0
        while passed < min(_PASSED, len(done)):
            key = next(iter(done))
            if keep(key):
                done.move_to_end(key)
                passed += 1
            else:
                del done[key]
                yield key
