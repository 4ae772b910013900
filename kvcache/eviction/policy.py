"""The seam: what orders the blocks of an index.

A policy only orders keys. It is told of accesses a request at a time, because a request's blocks
live and die together, and it offers stretches of chains to evict. It holds no bytes, takes no lock,
starts no thread and reads no clock: the index calls it under its own lock and hands it the time.

What a policy is told of a request, in this order::

    access(chain, held)    its whole prompt, when it is looked up; again while it waits
    admit(keys, after)     a stretch of it that there are no free slots for: asked before any copy
    evict(count, take)     at once after, as many as there are to be slots
    add(keys, after)       a stretch that is held from now on

Always true of a policy:

* What was taken is held no more, and is not offered again; what was offered and not taken is held.
* Its state is a bounded number of entries per block of capacity, whatever the traffic.
* Its answers follow from what it was told: no randomness, no clock of its own.

A policy that raises, or whose ``admit`` returns no integer, is replaced by LRU for the rest of the
process, and an error is logged. It must not wait: the index is locked.

``kvcache.testing.PolicyTests`` has this as tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

Take = Callable[[Sequence[bytes]], int]
"""Given a stretch of a chain, takes as many of its last blocks as may go, says how many.

It takes no more than were asked for in all. When it takes less than it could, what is last now has
to stay for the time being: it is in use, or another block continues it.
"""


class Policy(ABC):
    """Orders the keys of one index.

    Args:
        capacity: blocks that the index can hold.
    """

    @abstractmethod
    def __init__(self, capacity: int) -> None: ...

    @abstractmethod
    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        """A request asked for ``chain``, from its first block; ``chain[:held]`` were there."""

    @abstractmethod
    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        """Say how many leading ``keys`` are worth a slot of a full tier; asked before any copy."""

    @abstractmethod
    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        """``keys``, a stretch of a chain that continues ``parent``, are held from now on."""

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Forget keys that left for another reason than eviction."""

    @abstractmethod
    def evict(self, count: int, take: Take) -> None:
        """Have ``count`` blocks go: offer stretches to ``take``, the first to go first.

        Ends when so many were taken, or no more can be. May end where the next one is worth more
        than the block that it would go for, one of those that ``admit`` was asked about just
        before.
        """
