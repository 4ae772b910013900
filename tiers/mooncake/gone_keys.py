"""Keys of blocks that a pool still has and a tier must not load."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Final

MAX_GONE_KEYS: Final = 1 << 16


class GoneKeys:
    """A bounded set of keys; the oldest is dropped first. Safe to call from several threads.

    If a key is dropped, its block is found again. A damaged one then does not verify, and is
    removed again.

    Args:
        limit: the most keys that it holds.
    """

    def __init__(self, limit: int = MAX_GONE_KEYS) -> None:
        self._limit = limit
        self._keys: dict[bytes, None] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, keys: Iterable[bytes]) -> None:
        """Add ``keys``, as the newest ones."""
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)
                self._keys[key] = None
            while len(self._keys) > self._limit:
                del self._keys[next(iter(self._keys))]

    def discard(self, keys: Iterable[bytes]) -> None:
        """Remove those of ``keys`` that it holds."""
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)

    def split(self, keys: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Return those of ``keys`` that it does not hold, and those that it holds."""
        held = [key in self._keys for key in keys]
        return (
            [key for key, is_held in zip(keys, held, strict=True) if not is_held],
            [key for key, is_held in zip(keys, held, strict=True) if is_held],
        )
