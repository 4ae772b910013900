"""Events of a tier: which blocks it stored and removed, for a subscriber that publishes them.

Invariants: a tier reports events in the order in which they happened. The base class ignores
them, so that a tier without a subscriber calls it without a check.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple


class BlockEvents:
    """Receives the events of a tier, and ignores them."""

    def stored(self, keys: Collection[bytes]) -> None:
        """These blocks can be found from now on."""

    def removed(self, keys: Collection[bytes]) -> None:
        """The tier no longer holds these blocks."""

    def observed(self, keys: Sequence[bytes], held: Sequence[object]) -> None:
        """The tier reported which of ``keys`` it holds: ``held`` has a truth value for each."""

    def cleared(self) -> None:
        """All blocks were removed."""


class BlockEvent(NamedTuple):
    """Blocks that a tier stored, or removed; ``keys`` is ``None`` for all of its blocks."""

    stored: bool
    keys: Collection[bytes] | None


class BlockEventLog(BlockEvents):
    """Keeps events until they are taken, without a limit. Safe to use from any thread."""

    def __init__(self) -> None:
        self._events: deque[BlockEvent] = deque()

    def stored(self, keys: Collection[bytes]) -> None:
        if keys:
            self._events.append(BlockEvent(stored=True, keys=keys))

    def removed(self, keys: Collection[bytes]) -> None:
        if keys:
            self._events.append(BlockEvent(stored=False, keys=keys))

    def observed(self, keys: Sequence[bytes], held: Sequence[object]) -> None:
        if len(keys) == len(held):  # otherwise the answers cannot be matched to keys
            self.stored([key for key, is_held in zip(keys, held, strict=True) if is_held])
            self.removed([key for key, is_held in zip(keys, held, strict=True) if not is_held])

    def cleared(self) -> None:
        self._events.append(BlockEvent(stored=False, keys=None))

    def take(self) -> list[BlockEvent]:
        """Return the events since the last call, in order, and forget them."""
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken
