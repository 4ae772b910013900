"""Which blocks a tier came to hold, and which it no longer does, for those who publish it.

Always true here: a tier tells ``Changes`` in the order in which it happened; the plain ones cost a
call and keep nothing, so that nobody asks whether anybody listens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Changes:
    """Hears what a tier holds, and forgets it."""

    def came(self, keys: Collection[bytes]) -> None:
        """Blocks can be found from now on."""

    def left(self, keys: Collection[bytes]) -> None:
        """Blocks cannot be found any more."""

    def held(self, keys: Sequence[bytes], held: Sequence[object]) -> None:
        """The tier said of each of ``keys`` whether it holds it: what is true in ``held``."""

    def cleared(self) -> None:
        """Nothing that is held now can be found any more."""


class Change(NamedTuple):
    """Blocks that came to a tier, or that left it; ``None``: all of them."""

    came: bool
    keys: Collection[bytes] | None


class Journal(Changes):
    """Keeps what happened until it is taken: it grows until then. Safe to tell from any thread."""

    def __init__(self) -> None:
        self._changes: deque[Change] = deque()

    def came(self, keys: Collection[bytes]) -> None:
        if keys:
            self._changes.append(Change(came=True, keys=keys))

    def left(self, keys: Collection[bytes]) -> None:
        if keys:
            self._changes.append(Change(came=False, keys=keys))

    def held(self, keys: Sequence[bytes], held: Sequence[object]) -> None:
        if len(keys) == len(held):  # else there is no telling which is whose
            self.came([key for key, its in zip(keys, held, strict=True) if its])
            self.left([key for key, its in zip(keys, held, strict=True) if not its])

    def cleared(self) -> None:
        self._changes.append(Change(came=False, keys=None))

    def take(self) -> list[Change]:
        """What happened since this was called last, in order."""
        taken = []
        while self._changes:
            taken.append(self._changes.popleft())
        return taken
