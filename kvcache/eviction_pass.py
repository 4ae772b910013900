"""The pass that evicts blocks of an index, in the order in which a policy offers them.

Invariants: eviction takes blocks from the tail of a chain. It never takes a block that is
pinned, is being filled, or has a child in the index or is about to get one, whatever the policy
offers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvcache.segments import Segment, SegmentTable


class EvictionPass:
    """Removes blocks that a policy offers, until enough are evicted.

    Args:
        table: the segments; evicted blocks are removed from it.
        pins: pin counts by slot; a slot without pins has no entry.
        need: how many blocks to evict.

    Attributes:
        need: how many blocks are still to be evicted.
        keys: the evicted blocks' keys.
        slots: the evicted blocks' slots, in the same order.
        is_protected: returns ``True`` for a key that this pass must spare; ``None`` spares none.
    """

    __slots__ = ("_pins", "_table", "is_protected", "keys", "need", "slots")

    def __init__(self, table: SegmentTable, pins: Mapping[int, int], need: int) -> None:
        self._table = table
        self._pins = pins
        self.need = need
        self.keys: list[bytes] = []
        self.slots: list[int] = []
        self.is_protected: Callable[[bytes], bool] | None = None

    def take(self, offered: Sequence[bytes]) -> int:
        """Evict offered blocks, the last one first, until ``need`` is met or a block must stay.

        Returns:
            how many were evicted.
        """
        table, pins, need = self._table, self._pins, self.need
        offered = tuple(offered)
        end = len(offered)
        while end and need:
            segment = table.by_first_slot[table.first_slots[offered[end - 1]]]
            count = min(end, need, len(segment.keys))
            keys, slots = segment.keys[-count:], segment.slots[-count:]
            if (
                keys != offered[end - count : end]
                or self.is_protected is not None
                or not segment.ready
                or (pins and not pins.keys().isdisjoint(slots))
                or not table.child_counts.keys().isdisjoint(keys)
            ):
                count = self._count_evictable(segment, offered[end - count : end])
                if not count:
                    break
                keys, slots = keys[-count:], slots[-count:]
            table.remove_tail(segment, keys)
            self.slots += slots
            self.keys += keys
            end -= count
            need -= count
        self.need = need
        return len(offered) - end

    def _count_evictable(self, segment: Segment, offered: Sequence[bytes]) -> int:
        """How many of the last ``offered`` blocks are at the segment's tail and may be evicted."""
        child_counts, count = self._table.child_counts, 0
        if not segment.ready:
            return 0
        blocks = zip(
            reversed(segment.keys), reversed(segment.slots), reversed(offered), strict=False
        )
        for key, slot, offered_key in blocks:
            if key != offered_key or slot in self._pins or key in child_counts:
                break
            if self.is_protected is not None and self.is_protected(key):
                break
            count += 1
        return count
