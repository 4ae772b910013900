"""The blocks of an index, grouped into segments of chains.

::

    chain      a b c d e f      a segment is blocks that were reserved together, each continuing
    segments   a b c | d e f    the one before it; eviction shortens it, a drop cuts it in two
                     | x y      two segments have the parent `c`

All chains form a radix tree, with a segment as each edge.

Invariants:

* Every block is in exactly one segment. A segment has 1 to ``_MAX_BLOCKS`` blocks. A short segment
  that continues another one is merged into it when it is published.
* Inside a segment, every block but the last has a child. The last one has a child when a segment
  has it as parent.
* Most operations cost one step per segment, not per block.
* A table with an entry per block has bytes and integers only, and a segment keeps its keys and
  slots in tuples, so Python's garbage collector has nothing to scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from kvcache.keys import Branch, Keys, common_prefix_len

_MAX_BLOCKS = 256  # bounds the time to find a key in a segment
# Segments of up to this many blocks are merged into the segment that they continue: an engine
# stores an answer block by block, and each segment is another object for the garbage collector.
_MAX_MERGED_BLOCKS = 8

Slots = tuple[int, ...]


class Segment:
    """Consecutive blocks of one chain.

    Attributes:
        keys: the blocks' keys, head first.
        slots: the blocks' slots, in the same order.
        parent: the key that the first block continues; ``None`` for the first block of a chain.
        ready: whether the blocks can be found; ``False`` while they are being filled.
    """

    __slots__ = ("keys", "parent", "ready", "slots")

    def __init__(self, keys: Keys, slots: Slots, parent: bytes | None) -> None:
        self.keys = keys
        self.slots = slots
        self.parent = parent
        self.ready = False

    def slots_for(self, keys: Keys, start: int) -> Slots:
        """The slots of the leading ``keys[start:]`` that this segment has in this order.

        ``keys[start]`` must be in this segment.
        """
        own_keys = self.keys
        if len(own_keys) == 1:  # as side blocks are
            return self.slots
        first = 0 if own_keys[0] == keys[start] else own_keys.index(keys[start])
        return self.slots[first : first + common_prefix_len(own_keys, first, keys, start)]


class SegmentTable:
    """All segments of an index, found by key.

    Attributes:
        first_slots: for each key, the first slot of its segment.
        by_first_slot: the segments, by their first slot.
        child_counts: for each parent of a segment, how many segments continue it; the parent itself
            may be absent from the index.
        filling: the first slots of the segments that are not ready.
    """

    def __init__(self) -> None:
        self.first_slots: dict[bytes, int] = {}
        self.by_first_slot: dict[int, Segment] = {}
        self.child_counts: dict[bytes, int] = {}
        self.filling: set[int] = set()

    def find(self, key: bytes) -> Segment | None:
        """The segment that has this key."""
        return self.by_first_slot.get(self.first_slots.get(key, -1))

    def count_ready(self, keys: Keys, start: int) -> int:
        """How many leading blocks of ``keys[start:]`` are ready."""
        end = start
        while end < len(keys):
            segment = self.find(keys[end])
            if segment is None or not segment.ready:
                break
            end += len(segment.slots_for(keys, end))
        return end - start

    def locate(self, keys: Keys) -> tuple[list[int], list[int]]:
        """The positions in ``keys`` of those that have a block, and their slots."""
        positions: list[int] = []
        slots: list[int] = []
        at = 0
        while at < len(keys):
            if (segment := self.find(keys[at])) is None:
                at += 1
                continue
            found = segment.slots_for(keys, at)
            positions += range(at, at + len(found))
            slots += found
            at += len(found)
        return positions, slots

    def add(self, keys: Keys, slots: Slots, parent: bytes | None) -> None:
        """Add blocks that are being filled and continue ``parent``."""
        first_slots = self.first_slots
        for begin in range(0, len(keys), _MAX_BLOCKS):
            segment_keys = keys[begin : begin + _MAX_BLOCKS]
            segment_slots = slots[begin : begin + _MAX_BLOCKS]
            first = segment_slots[0]
            for key in segment_keys:
                first_slots[key] = first
            self.by_first_slot[first] = Segment(segment_keys, segment_slots, parent)
            self.filling.add(first)
            if parent is not None:
                self.add_child(parent)
            parent = segment_keys[-1]

    def absent(self, keys: Keys) -> Sequence[int]:
        """The positions of the ``keys`` that have no block; of a key twice, the first one."""
        if len(set(keys)) == len(keys) and self.first_slots.keys().isdisjoint(keys):
            return range(len(keys))
        return self.find_absent(keys)

    def find_absent(self, keys: Keys) -> Sequence[int]:
        """As :meth:`absent`; faster where some key has a block, slower where none has one."""
        first_slots = self.first_slots
        firsts = {key: at for at, key in reversed(list(enumerate(keys)))}
        return sorted(at for key, at in firsts.items() if key not in first_slots)

    def add_at(
        self, keys: Keys, positions: Sequence[int], slots: Slots, parent: bytes | None
    ) -> None:
        """Add the blocks at ``positions`` of a segment that continues ``parent``."""
        done, count = 0, len(positions)
        while done < count:
            first, end = positions[done], count
            if positions[-1] - first >= end - done:  # a key in between is not added
                end = next(at for at in range(done, end) if positions[at] - first > at - done)
            before = keys[first - 1] if first else parent
            self.add(keys[first : first + end - done], slots[done:end], before)
            done = end

    def restore(self, branches: Sequence[Branch], slots: Slots) -> bool:
        """Fill an empty table with blocks that are ready, as if they were published one by one.

        Args:
            branches: the blocks, as segments of chains.
            slots: the slots of all blocks, in the same order.

        Returns:
            whether it was done: not if a key is there twice, or if a chain continues itself.
        """
        firsts: list[int] = []
        for keys, _ in branches:
            for begin in range(0, len(keys), _MAX_BLOCKS):
                firsts += [slots[len(firsts)]] * min(_MAX_BLOCKS, len(keys) - begin)
        all_keys = chain.from_iterable([keys for keys, _ in branches])
        first_slots = dict(zip(all_keys, firsts, strict=True))
        if len(first_slots) < len(slots):
            return False
        self.first_slots = first_slots
        too_early: list[bytes] = []  # parents that are restored after a block that continues them
        end = 0
        for branch, parent in branches:
            begin, end = end, end + len(branch)
            if parent is not None and parent in first_slots and self.find(parent) is None:
                too_early.append(parent)
            self._restore_branch(tuple(branch), slots[begin:end], parent)
        if self._has_cycle(too_early):
            self.clear()
            return False
        return True

    def _has_cycle(self, keys: Sequence[bytes]) -> bool:
        """Whether the chain that ends with one of ``keys`` continues itself."""
        acyclic: set[int] = set()  # first slots of segments
        for key in keys:
            passed: set[int] = set()
            parent: bytes | None = key
            while parent is not None and (segment := self.find(parent)) is not None:
                first = segment.slots[0]
                if first in passed:
                    return True
                if first in acyclic:
                    break
                passed.add(first)
                parent = segment.parent
            acyclic |= passed
        return False

    def _restore_branch(self, keys: Keys, slots: Slots, parent: bytes | None) -> None:
        """Add a segment for each part of ``keys``; the first part may join that of the parent."""
        for begin in range(0, len(keys), _MAX_BLOCKS):
            segment_keys = keys[begin : begin + _MAX_BLOCKS]
            segment = Segment(segment_keys, slots[begin : begin + _MAX_BLOCKS], parent)
            segment.ready = True
            self.by_first_slot[segment.slots[0]] = segment
            if parent is not None:
                self.add_child(parent)
                if not begin:
                    self._merge_into_parent(segment)
            parent = segment_keys[-1]

    def add_child(self, parent: bytes) -> None:
        """Count one more child of ``parent``."""
        self.child_counts[parent] = self.child_counts.get(parent, 0) + 1

    def remove_child(self, parent: bytes) -> None:
        """Count one child of ``parent`` fewer."""
        if (remaining := self.child_counts[parent] - 1) > 0:
            self.child_counts[parent] = remaining
        else:
            del self.child_counts[parent]

    def publish(self, slots: Slots) -> list[tuple[Keys, bytes | None]]:
        """Make the blocks in ``slots`` ready, in this order.

        Returns:
            the chains that they form: the keys of each, and the parent of its first block.
        """
        filling = self.filling
        chains: list[tuple[list[Keys], bytes | None]] = []
        done = 0
        while done < len(slots):
            slot = slots[done]
            segment = self.by_first_slot.get(slot)
            if segment is None:  # only part of a segment is published: cut it
                whole = next(
                    each for each in map(self.by_first_slot.__getitem__, filling)
                    if slot in each.slots
                )  # fmt: skip
                segment = self._cut(whole, whole.slots.index(slot))
            end = done + len(segment.slots)
            if segment.slots != slots[done:end]:
                pairs = zip(segment.slots, [*slots[done:end], None], strict=False)
                self._cut(segment, next(at for at, (a, b) in enumerate(pairs) if a != b))
                end = done + len(segment.slots)
            done = end
            segment.ready = True
            filling.remove(slot)
            keys, parent = segment.keys, segment.parent
            if len(keys) <= _MAX_MERGED_BLOCKS:
                self._merge_into_parent(segment)
            if chains and chains[-1][0][-1][-1] == parent:
                chains[-1][0].append(keys)
            else:
                chains.append(([keys], parent))
        return [
            (parts[0] if len(parts) == 1 else tuple(chain.from_iterable(parts)), parent)
            for parts, parent in chains
        ]

    def _merge_into_parent(self, segment: Segment) -> None:
        """Append a segment to the ready segment that ends with its parent, if there is room."""
        parent, first_slots = segment.parent, self.first_slots
        before = self.find(parent) if parent is not None else None
        if parent is None or before is None or not before.ready or before.keys[-1] != parent:
            return
        if before is segment:  # it continues itself
            return
        if len(before.keys) + len(segment.keys) <= _MAX_BLOCKS:
            del self.by_first_slot[segment.slots[0]]
            before.keys += segment.keys
            before.slots += segment.slots
            first = before.slots[0]
            for key in segment.keys:
                first_slots[key] = first
            self.remove_child(parent)

    def remove_tail(self, segment: Segment, keys: Keys) -> None:
        """Remove ``keys``, the last ones of a segment."""
        first_slots = self.first_slots
        for key in keys:
            del first_slots[key]
        if remaining := len(segment.keys) - len(keys):
            segment.keys, segment.slots = segment.keys[:remaining], segment.slots[:remaining]
            return
        first = segment.slots[0]
        del self.by_first_slot[first]
        self.filling.discard(first)
        if segment.parent is not None:
            self.remove_child(segment.parent)

    def remove(self, key: bytes) -> int:
        """Remove one block, whether or not it has children, and return its slot."""
        segment = self.by_first_slot[self.first_slots[key]]
        if segment.keys[-1] != key:
            self._cut(segment, segment.keys.index(key) + 1)
        slot = segment.slots[-1]
        self.remove_tail(segment, (key,))
        return slot

    def _cut(self, segment: Segment, at: int) -> Segment:
        """Split a segment: move its blocks from position ``at`` to a new one, and return that."""
        keys, slots = segment.keys[at:], segment.slots[at:]
        segment.keys, segment.slots = segment.keys[:at], segment.slots[:at]
        self.add(keys, slots, segment.keys[-1])
        new = self.by_first_slot[slots[0]]
        if segment.ready:
            self.filling.remove(slots[0])
            new.ready = True
        return new

    def clear(self) -> None:
        """Remove all blocks."""
        self.first_slots.clear()
        self.by_first_slot.clear()
        self.child_counts.clear()
        self.filling.clear()

    def slots(self, *, ready: bool) -> dict[bytes, int]:
        """The slot of each block that is ready, or of each that is being filled."""
        by_first_slot = self.by_first_slot
        return {
            key: slot
            for segment in map(by_first_slot.__getitem__, by_first_slot if ready else self.filling)
            if segment.ready == ready
            for key, slot in zip(segment.keys, segment.slots, strict=True)
        }

    def check(self) -> None:
        """Raise ``AssertionError`` if an invariant is broken. Takes time linear in the blocks."""
        child_counts: dict[bytes, int] = {}
        segments = self.by_first_slot.values()
        for first, segment in self.by_first_slot.items():
            assert all(self.first_slots[key] == first for key in segment.keys), "a key is misplaced"
            assert first == segment.slots[0], "a segment is misplaced"
            assert 0 < len(segment.keys) == len(segment.slots) <= _MAX_BLOCKS, "a wrong size"
            if segment.parent is not None:
                child_counts[segment.parent] = child_counts.get(segment.parent, 0) + 1
        filling = {first for first, segment in self.by_first_slot.items() if not segment.ready}
        assert filling == self.filling, "filling segments are miscounted"
        assert sum(len(each.keys) for each in segments) == len(self.first_slots), "a key is twice"
        assert child_counts == self.child_counts, "children are miscounted"
