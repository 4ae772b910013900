"""The eviction policy interface: a policy decides in which order blocks leave an index.

A policy only orders keys. It holds no bytes, takes no lock, starts no thread and reads no clock:
the index calls it under the index's lock and passes the time. Calls cover a whole request or a
segment of a chain, not a single block, because the blocks of a request are stored and evicted
together.

For each request the index calls, in this order::

    access(chain, held)      at a lookup, with the whole prompt; repeated while the request waits
    admit(keys, parent)      before any copy, when a segment does not fit into the free slots
    evict(count, take)       right after admit, to free as many slots as are still missing
    add(keys, parent)        when a segment has been stored

A model with windows or states has *side blocks* as well: each hangs below the block of the chain
that ends at the same token, and nothing continues it. Side blocks come first in each kind of call::

    access(needed, len(needed))   the side blocks of a group that the request resumes with
    access(chain, held)           the chain, also its held blocks beyond the resume point
    admit(keys, parent)           once for the chain and its side blocks together
    add(parts, parent)            a side block, before its parent
    add(keys, parent)             the chain

Invariants of a policy:

* A key that ``take`` evicted is no longer held, and is not offered again. A key that was offered
  and not evicted is still held.
* The state is a bounded number of entries per block of capacity, whatever the traffic.
* The same calls have the same results: no randomness, no clock of its own.

If a policy raises, or ``admit`` returns no integer, the index logs an error and uses LRU instead
until its tier is reopened. A policy must not wait for anything, since the index is locked.

``kvcache.testing.PolicyTests`` tests these invariants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

Take = Callable[[Sequence[bytes]], int]
"""Evicts blocks from the tail of the segment that it is given; returns how many.

In total it evicts at most the ``count`` of the ``evict`` call. If it evicts fewer blocks than were
offered before that count is reached, the last remaining block has to stay for now: it is pinned or
protected, or another block continues it.
"""


class Policy(ABC):
    """Orders the keys of one index.

    Args:
        capacity: blocks that the index can hold.
    """

    @abstractmethod
    def __init__(self, capacity: int) -> None: ...

    def expect_sides(self) -> None:
        """Note that the index stores side blocks from now on, reported by ``add`` before their
        chain. It is called before every store of side blocks; by default it does nothing."""
        return

    @abstractmethod
    def access(self, chain: Sequence[bytes], held: int, now: float) -> None:
        """Record that a request looked up ``chain`` and found its first ``held`` blocks.

        Args:
            chain: keys of the prompt's blocks, from its first block.
            held: length of the prefix that the index holds.
            now: seconds on the index's clock; this holds for every ``now`` below.
        """

    @abstractmethod
    def admit(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> int:
        """Return how many leading ``keys`` are worth a slot of the full tier.

        The index calls this before it copies anything. Blocks beyond the count are declined: they
        are not stored.
        """

    @abstractmethod
    def add(self, keys: Sequence[bytes], parent: bytes | None, now: float) -> None:
        """Record that ``keys``, a segment of a chain that continues ``parent``, are now held."""

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Forget ``keys``, which left the index for a reason other than eviction."""

    @abstractmethod
    def evict(self, count: int, take: Take) -> None:
        """Evict ``count`` blocks: offer segments to ``take``, the best victims first.

        Stops after ``count`` blocks, or when nothing is evictable. May stop earlier if the next
        victim is worth more than the incoming blocks, those of the ``admit`` call just before.
        """
