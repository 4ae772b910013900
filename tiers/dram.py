"""L1: a front tier in host memory, which lends its slots in place.

Invariants:

* The slab has the bytes, the index the state of the slots. One lock guards the index; no bytes are
  copied under it.
* A slot is lent only after its memory was populated, so no request waits for a page fault.
* The number of blocks never exceeds what ``capacity`` bytes hold.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

from kvcache.events import BlockEvents
from kvcache.eviction import DEFAULT, Eviction, fallback, policy_option
from kvcache.guards.front_tier import exempt_from_guard
from kvcache.index import Index
from kvcache.keys import Branch
from kvcache.process import bind_to_process
from kvcache.sizes import Size
from kvcache.slab import Slab, slot_nbytes_for
from kvcache.tier import FrontTier, Lease, TierStats


@exempt_from_guard
class DramTier(FrontTier):
    """A front tier in this host's memory.

    Args:
        block_nbytes: bytes of a block, of all ranks together.
        capacity: bytes of memory to allocate.
        eviction: the eviction policy: a shipped one by name, or a class path.
        huge_pages: whether to take free huge pages (``vm.nr_hugepages``), as many as there are or
            ``capacity`` needs. The rest of L1 is in ordinary pages.
        wait_pinned: whether the engine's start waits until all of ``capacity`` is allocated, and
            on a GPU pinned. By default both continue while the engine serves requests.
        nodes: NUMA nodes from which the memory comes; empty for no preference.
        clock: the current time in seconds, for the eviction policy.

    Attributes:
        index: the state of the slots, for tests and tools.
        lock: guards ``index``.

    Raises:
        ValueError: ``capacity`` holds no block, ``block_nbytes`` is not positive, or ``eviction``
            is no policy.
        SlabError: the kernel refused the memory.
    """

    def __init__(
        self,
        *,
        block_nbytes: int,
        capacity: Size,
        eviction: Eviction = DEFAULT,
        huge_pages: bool = True,
        wait_pinned: bool = False,
        nodes: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if block_nbytes < 1:
            raise ValueError(f"block_nbytes is {block_nbytes}; a block has at least one byte")
        policy = policy_option(eviction)
        slot_nbytes = slot_nbytes_for(block_nbytes)
        slots = capacity // slot_nbytes
        if slots < 1:
            raise ValueError(f"capacity is {capacity} bytes; one block takes {slot_nbytes}")
        self.block_nbytes = block_nbytes
        self.wait_pinned = wait_pinned
        self.lock = threading.Lock()
        self.index = Index(policy(slots), clock, fallback.lru)
        self.slab = Slab.create(slots, slot_nbytes, nodes=nodes, use_huge_pages=huge_pages)
        self.slab.populate(self._open_slots)
        bind_to_process(self)

    def _open_slots(self, slots: int) -> None:
        with self.lock:
            self.index.open_slots(slots)

    # The contract of every tier

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self.lock:
            return [key in self.index for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        for buffer in into:
            if len(buffer) < self.block_nbytes:
                raise ValueError(
                    f"a buffer of {len(buffer)} bytes; a block has {self.block_nbytes}"
                )
        written: list[int] = []
        for key, buffer in zip(keys, into, strict=True):
            with self.pin([key]) as lease:
                for view in lease.views:
                    buffer[: self.block_nbytes] = view
                written.append(self.block_nbytes if lease.keys else 0)
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        for block in blocks:
            if len(block) != self.block_nbytes:
                raise ValueError(
                    f"a block of {len(block)} bytes; this tier keeps {self.block_nbytes}"
                )
        stored: list[bool] = []
        for key, block in zip(keys, blocks, strict=True):
            with self.reserve([key], parent) as lease:
                for view in lease.views:
                    view[:] = block
            stored.append(bool(lease.keys) or self.contains([key])[0])
            parent = key
        return stored

    def remove(self, keys: Sequence[bytes]) -> None:
        with self.lock:
            self.index.drop(keys)

    def close(self) -> None:
        self.slab.close()

    # The contract of front tiers

    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        with self.lock:
            return self.index.access(chain, start)

    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int:
        with self.lock:
            return self.index.count_prefix(chain, start)

    def reserve(self, keys: Sequence[bytes], parent: bytes | None = None) -> Lease:
        with self.lock:
            evicted_before = self.index.evicted_blocks
            positions, slots = self.index.reserve(keys, parent)
            evicted = self.index.evicted_blocks - evicted_before
        reserved = [keys[at] for at in positions]
        lease = Lease(reserved, slots, positions, self._view, self._publish)
        lease.evicted = evicted
        return lease

    def reserve_branches(self, chains: Sequence[Branch], sides: Sequence[Branch] = ()) -> Lease:
        if len(chains) == 1 and not sides:
            return self.reserve(*chains[0])
        with self.lock:
            evicted_before = self.index.evicted_blocks
            positions, slots = self.index.reserve_branches(chains, sides)
            evicted = self.index.evicted_blocks - evicted_before
        keys = [key for branch, _ in [*chains, *sides] for key in branch]
        # A policy that learns of a chain after its side blocks evicts the side blocks first.
        first_side = bisect_left(positions, sum(len(branch) for branch, _ in chains))
        in_order = slots[first_side:] + slots[:first_side]

        def publish(_: Lease, failed: frozenset[bytes]) -> None:
            with self.lock:
                self.index.publish(in_order, failed)

        lease = Lease([keys[at] for at in positions], slots, positions, self._view, publish)
        lease.evicted = evicted
        return lease

    def pin(self, keys: Sequence[bytes]) -> Lease:
        with self.lock:
            slots = self.index.pin(keys)
        return Lease(keys[: len(slots)], slots, range(len(slots)), self._view, self._release)

    def pin_any(self, keys: Sequence[bytes]) -> Lease:
        with self.lock:
            positions, slots = self.index.pin_any(keys)
        return Lease([keys[at] for at in positions], slots, positions, self._view, self._release)

    def _view(self, slot: int) -> memoryview:
        return self.slab.view(slot)[: self.block_nbytes]

    def _publish(self, lease: Lease, failed: frozenset[bytes]) -> None:
        with self.lock:
            self.index.publish(lease.slots, failed)

    def _release(self, lease: Lease, failed: frozenset[bytes]) -> None:
        with self.lock:
            if failed:
                self.index.drop(failed)
            self.index.unpin(lease.slots)

    def mark_done(self, keys: Sequence[bytes]) -> None:
        with self.lock:
            self.index.mark_done(keys)

    def protect(self, keys: Sequence[bytes], seconds: float) -> None:
        with self.lock:
            self.index.protect(keys, seconds)

    def disable_admission(self) -> None:
        with self.lock:
            self.index.admission = False

    def clear(self) -> None:
        with self.lock:
            self.index.clear()

    def subscribe(self, events: BlockEvents) -> None:
        with self.lock:
            self.index.events = events

    def stats(self) -> TierStats:
        with self.lock:
            index = self.index
            return TierStats(
                capacity_blocks=self.slab.slots,
                populated_blocks=index.slots,
                used_blocks=len(index),
                pinned_slots=index.pinned_slots,
                block_nbytes=self.block_nbytes,
                lookup_blocks=index.lookup_blocks,
                hit_blocks=index.hit_blocks,
                stored_blocks=index.stored_blocks,
                declined_blocks=index.declined_blocks,
                failed_blocks=index.failed_blocks,
                evicted_blocks=index.evicted_blocks,
                dropped_blocks=index.dropped_blocks,
                unkept_blocks=index.hints.refused_blocks,
            )
