"""The blocks of an index as they came: in stretches of chains.

::

    chain      a b c d e f      a stretch is blocks that came together, each continuing the one
    stretches  a b c | d e f    before it; it loses its tail, or is cut in two
                     | x y      two that continue `c`

Always true here:

* Every block is in one stretch, and a stretch has a block, and no more than ``_MOST``. A few blocks
  that continue one become its end when they can be found.
* A block that is not the last of its stretch is continued in the index; the last one is when a
  stretch has begun after it.
* Most of what is done is done for a stretch at a time: blocks come and go by dozens.
* A table with an entry for each block has bytes and integers only, and those of a stretch are in
  tuples: Python's garbage collector need not look at any of it.

What leaves an index to make room.

Always true here: of a chain the last block leaves first, and none that is pinned, that another
block continues, or that is about to be continued; whatever a policy offers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from kvcache.keys import Keys, common_prefix_len

_MOST = 256  # so that finding one of them is quick
# So many blocks join the stretch that they continue: an answer comes a block at a time, and every
# stretch is another thing for the garbage collector to look at.
_FEW = 8

Slots = tuple[int, ...]


class Segment:
    """Consecutive blocks of one chain.

    Attributes:
        keys: of the blocks, head first.
        slots: the same blocks'.
        after: the key that the first of them continues.
        ready: they can be found: they are not being filled.
    """

    __slots__ = ("keys", "parent", "ready", "slots")

    def __init__(self, keys: Keys, slots: Slots, parent: bytes | None) -> None:
        self.keys = keys
        self.slots = slots
        self.parent = parent
        self.ready = False

    def part(self, keys: Keys, at: int) -> Slots:
        """The slots of the blocks that ``keys`` have from ``at`` on, of which the first is here."""
        ours = self.keys
        first = 0 if ours[0] == keys[at] else ours.index(keys[at])
        return self.slots[first : first + common_prefix_len(ours, first, keys, at)]


class Segments:
    """In which stretch the block of each key is, and what continues it."""

    def __init__(self) -> None:
        self.of: dict[bytes, int] = {}  # the first slot of the stretch that a key is in
        self.at: dict[int, Segment] = {}  # the stretch that begins in a slot
        self.begun: dict[bytes, int] = {}  # stretches that begin after a key, be it here or not
        self.filling: set[int] = set()  # where those begin that are not ready

    def find(self, key: bytes) -> Segment | None:
        """The stretch that a key is in."""
        return self.at.get(self.of.get(key, -1))

    def put(self, keys: Keys, slots: Slots, parent: bytes | None) -> None:
        """Blocks come that continue ``parent``, and are being filled."""
        of = self.of
        for begin in range(0, len(keys), _MOST):
            some, lent = keys[begin : begin + _MOST], slots[begin : begin + _MOST]
            first = lent[0]
            for key in some:
                of[key] = first
            self.at[first] = Segment(some, lent, parent)
            self.filling.add(first)
            if parent is not None:
                self.begin(parent)
            parent = some[-1]

    def begin(self, parent: bytes) -> None:
        """One more stretch begins after this key."""
        self.begun[parent] = self.begun.get(parent, 0) + 1

    def end(self, parent: bytes) -> None:
        """One less does."""
        if (left := self.begun[parent] - 1) > 0:
            self.begun[parent] = left
        else:
            del self.begun[parent]

    def publish(self, slots: Slots) -> list[tuple[Keys, bytes | None]]:
        """Make what is in ``slots`` ready, in this order.

        Returns:
            the chains that it makes: their keys, and what they continue.
        """
        filling = self.filling
        chains: list[tuple[list[Keys], bytes | None]] = []
        done = 0
        while done < len(slots):
            slot = slots[done]
            stretch = self.at.get(slot)
            if stretch is None:  # what was put is published in parts
                whole = next(at for at in map(self.at.__getitem__, filling) if slot in at.slots)
                stretch = self._cut(whole, whole.slots.index(slot))
            end = done + len(stretch.slots)
            if stretch.slots != slots[done:end]:
                pairs = zip(stretch.slots, [*slots[done:end], None], strict=False)
                self._cut(stretch, next(at for at, (a, b) in enumerate(pairs) if a != b))
                end = done + len(stretch.slots)
            done = end
            stretch.ready = True
            filling.remove(slot)
            keys, parent = stretch.keys, stretch.parent
            if len(keys) <= _FEW:
                self._join(stretch)
            if chains and chains[-1][0][-1][-1] == parent:
                chains[-1][0].append(keys)
            else:
                chains.append(([keys], parent))
        return [
            (parts[0] if len(parts) == 1 else tuple(chain.from_iterable(parts)), parent)
            for parts, parent in chains
        ]

    def _join(self, stretch: Segment) -> None:
        """Make a stretch the end of the one that it continues, if it does."""
        parent, of = stretch.parent, self.of
        before = self.find(parent) if parent is not None else None
        if parent is None or before is None or not before.ready or before.keys[-1] != parent:
            return
        if len(before.keys) + len(stretch.keys) <= _MOST:
            del self.at[stretch.slots[0]]
            before.keys += stretch.keys
            before.slots += stretch.slots
            first = before.slots[0]
            for key in stretch.keys:
                of[key] = first
            self.end(parent)

    def shorten(self, stretch: Segment, keys: Keys) -> None:
        """``keys``, the last ones of a stretch, leave."""
        of = self.of
        for key in keys:
            del of[key]
        if left := len(stretch.keys) - len(keys):
            stretch.keys, stretch.slots = stretch.keys[:left], stretch.slots[:left]
            return
        first = stretch.slots[0]
        del self.at[first]
        self.filling.discard(first)
        if stretch.parent is not None:
            self.end(stretch.parent)

    def remove(self, key: bytes) -> int:
        """A block leaves, whatever continues it; give its slot."""
        stretch = self.at[self.of[key]]
        if stretch.keys[-1] != key:
            self._cut(stretch, stretch.keys.index(key) + 1)
        slot = stretch.slots[-1]
        self.shorten(stretch, (key,))
        return slot

    def _cut(self, stretch: Segment, at: int) -> Segment:
        """Make what is behind the first ``at`` blocks a stretch of its own, and give that."""
        keys, slots = stretch.keys[at:], stretch.slots[at:]
        stretch.keys, stretch.slots = stretch.keys[:at], stretch.slots[:at]
        self.put(keys, slots, stretch.keys[-1])
        new = self.at[slots[0]]
        if stretch.ready:
            self.filling.remove(slots[0])
            new.ready = True
        return new

    def clear(self) -> None:
        """All blocks leave."""
        self.of.clear()
        self.at.clear()
        self.begun.clear()
        self.filling.clear()

    def slots(self, *, ready: bool) -> dict[bytes, int]:
        """The slot of each block that is ready, or is not."""
        return {
            key: slot
            for stretch in map(self.at.__getitem__, self.at if ready else self.filling)
            if stretch.ready == ready
            for key, slot in zip(stretch.keys, stretch.slots, strict=True)
        }

    def check(self) -> None:
        """Raise ``AssertionError`` where what is always true is not; linear in blocks."""
        begun: dict[bytes, int] = {}
        stretches = self.at.values()
        for first, stretch in self.at.items():
            assert all(self.of[key] == first for key in stretch.keys), "a block is elsewhere"
            assert first == stretch.slots[0], "a stretch is elsewhere"
            assert 0 < len(stretch.keys) == len(stretch.slots) <= _MOST, "a stretch has no slots"
            if stretch.parent is not None:
                begun[stretch.parent] = begun.get(stretch.parent, 0) + 1
        filling = {first for first, stretch in self.at.items() if not stretch.ready}
        assert filling == self.filling, "what is being filled is miscounted"
        assert sum(len(stretch.keys) for stretch in stretches) == len(self.of), "a block is twice"
        assert begun == self.begun, "what has begun is miscounted"


class EvictionPass:
    """Blocks that leave, and how many more are to.

    Args:
        stretches: all there are; those that leave are taken out.
        pins: by slot.
        need: how many are to leave.

    Attributes:
        keys: of those that have left.
        slots: the same blocks'.
        kept: for which keys others should go first.
    """

    __slots__ = ("_pins", "_stretches", "kept", "keys", "need", "slots")

    def __init__(self, stretches: Segments, pins: Mapping[int, int], need: int) -> None:
        self._stretches = stretches
        self._pins = pins
        self.need = need
        self.keys: list[bytes] = []
        self.slots: list[int] = []
        self.kept: Callable[[bytes], bool] | None = None

    def take(self, offered: Sequence[bytes]) -> int:
        """Have the last of these leave, as many as can and are to; give how many."""
        stretches, pins, need = self._stretches, self._pins, self.need
        offered = tuple(offered)
        end = len(offered)
        while end and need:
            stretch = stretches.at[stretches.of[offered[end - 1]]]
            some = min(end, need, len(stretch.keys))
            keys, slots = stretch.keys[-some:], stretch.slots[-some:]
            if (
                keys != offered[end - some : end]
                or self.kept is not None
                or not stretch.ready
                or (pins and not pins.keys().isdisjoint(slots))
                or not stretches.begun.keys().isdisjoint(keys)
            ):
                some = self._loose(stretch, offered[end - some : end])
                if not some:
                    break
                keys, slots = keys[-some:], slots[-some:]
            stretches.shorten(stretch, keys)
            self.slots += slots
            self.keys += keys
            end -= some
            need -= some
        self.need = need
        return len(offered) - end

    def _loose(self, stretch: Segment, offered: Sequence[bytes]) -> int:
        """How many of the last blocks of both, a block at a time."""
        begun, count = self._stretches.begun, 0
        if not stretch.ready:
            return 0
        pairs = zip(
            reversed(stretch.keys), reversed(stretch.slots), reversed(offered), strict=False
        )
        for key, slot, theirs in pairs:
            if key != theirs or slot in self._pins or key in begun:
                break
            if self.kept is not None and self.kept(key):
                break
            count += 1
        return count
