"""Which blocks a tier came to hold, and which it no longer does, for those who publish it.

Always true here: a tier reports changes in their order. The base class ignores them, at the cost of
a call, so that a tier without a subscriber needs no branch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple


class BlockEvents:
    """Hears what a tier holds, and forgets it."""

    def stored(self, keys: Collection[bytes]) -> None:
        """Blocks can be found from now on."""

    def removed(self, keys: Collection[bytes]) -> None:
        """Blocks cannot be found any more."""

    def observed(self, keys: Sequence[bytes], held: Sequence[object]) -> None:
        """The tier said of each of ``keys`` whether it holds it: what is true in ``held``."""

    def cleared(self) -> None:
        """Nothing that is held now can be found any more."""


class BlockEvent(NamedTuple):
    """Blocks that came to a tier, or that left it; ``None``: all of them."""

    stored: bool
    keys: Collection[bytes] | None


class BlockEventLog(BlockEvents):
    """Keeps what happened until it is taken: it grows until then. Safe to tell from any thread."""

    def __init__(self) -> None:
        self._changes: deque[BlockEvent] = deque()

    def stored(self, keys: Collection[bytes]) -> None:
        if keys:
            self._changes.append(BlockEvent(stored=True, keys=keys))

    def removed(self, keys: Collection[bytes]) -> None:
        if keys:
            self._changes.append(BlockEvent(stored=False, keys=keys))

    def observed(self, keys: Sequence[bytes], held: Sequence[object]) -> None:
        if len(keys) == len(held):  # else there is no telling which is whose
            self.stored([key for key, its in zip(keys, held, strict=True) if its])
            self.removed([key for key, its in zip(keys, held, strict=True) if not its])

    def cleared(self) -> None:
        self._changes.append(BlockEvent(stored=False, keys=None))

    def take(self) -> list[BlockEvent]:
        """What happened since this was called last, in order."""
        taken = []
        while self._changes:
            taken.append(self._changes.popleft())
        return taken
