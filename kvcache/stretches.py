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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_MOST = 256  # so that finding one of them is quick
# So many blocks join the stretch that they continue: an answer comes a block at a time, and every
# stretch is another thing for the garbage collector to look at.
_FEW = 8


class Stretch:
    """Consecutive blocks of one chain.

    Attributes:
        keys: of the blocks, head first.
        slots: the same blocks'.
        after: the key that the first of them continues.
        ready: they can be found: they are not being filled.
    """

    __slots__ = ("after", "keys", "ready", "slots")

    def __init__(self, keys: list[bytes], slots: list[int], after: bytes | None) -> None:
        self.keys = keys
        self.slots = slots
        self.after = after
        self.ready = False

    def part(self, keys: Sequence[bytes], at: int) -> list[int]:
        """The slots of the blocks that ``keys`` have from ``at`` on, of which the first is here."""
        ours = self.keys
        first = 0 if ours[0] == keys[at] else ours.index(keys[at])
        count = min(len(ours) - first, len(keys) - at)
        if ours[first : first + count] != keys[at : at + count]:
            count = next(n for n in range(count) if ours[first + n] != keys[at + n])
        return self.slots[first : first + count]


class Stretches:
    """In which stretch the block of each key is, and what continues it."""

    def __init__(self) -> None:
        self.of: dict[bytes, Stretch] = {}
        self.begun: dict[bytes, int] = {}  # stretches that begin after a key, be it here or not
        self.filling: dict[int, Stretch] = {}  # those that are not ready, by their first slot

    def put(self, keys: list[bytes], slots: list[int], after: bytes | None) -> None:
        """Blocks come that continue ``after``, and are being filled."""
        if len(keys) > _MOST:
            self.put(keys[:_MOST], slots[:_MOST], after)
            self.put(keys[_MOST:], slots[_MOST:], keys[_MOST - 1])
            return
        stretch, of = Stretch(keys, slots, after), self.of
        for key in keys:
            of[key] = stretch
        self.filling[slots[0]] = stretch
        if after is not None:
            self.begin(after)

    def begin(self, after: bytes) -> None:
        """One more stretch begins after this key."""
        self.begun[after] = self.begun.get(after, 0) + 1

    def end(self, after: bytes) -> None:
        """One less does."""
        if (left := self.begun[after] - 1) > 0:
            self.begun[after] = left
        else:
            del self.begun[after]

    def publish(self, slots: Sequence[int]) -> Iterator[tuple[list[bytes], bytes | None]]:
        """Make what is in ``slots`` ready, in this order; give its keys, and what they continue."""
        filling = self.filling
        done = 0
        while done < len(slots):
            slot = slots[done]
            stretch = filling.get(slot)
            if stretch is None:  # what was put is published in parts
                whole = next(stretch for stretch in filling.values() if slot in stretch.slots)
                stretch = self._cut(whole, whole.slots.index(slot))
            end = done + len(stretch.slots)
            if stretch.slots != slots[done:end]:
                pairs = zip(stretch.slots, [*slots[done:end], None], strict=False)
                self._cut(stretch, next(at for at, (a, b) in enumerate(pairs) if a != b))
                end = done + len(stretch.slots)
            done = end
            stretch.ready = True
            del filling[slot]
            yield stretch.keys[:], stretch.after
            if len(stretch.keys) <= _FEW:
                self._join(stretch)

    def _join(self, stretch: Stretch) -> None:
        """Make a stretch the end of the one that it continues, if it does."""
        after, of = stretch.after, self.of
        before = of.get(after) if after is not None else None
        if after is None or before is None or not before.ready or before.keys[-1] != after:
            return
        if len(before.keys) + len(stretch.keys) <= _MOST:
            before.keys += stretch.keys
            before.slots += stretch.slots
            for key in stretch.keys:
                of[key] = before
            self.end(after)

    def shorten(self, stretch: Stretch, keys: list[bytes]) -> None:
        """``keys``, the last ones of a stretch, leave."""
        of, count = self.of, len(keys)
        for key in keys:
            del of[key]
        if count < len(stretch.keys):
            del stretch.keys[-count:], stretch.slots[-count:]
            return
        if not stretch.ready:
            del self.filling[stretch.slots[0]]
        stretch.keys, stretch.slots = [], []
        if stretch.after is not None:
            self.end(stretch.after)

    def remove(self, key: bytes) -> int:
        """A block leaves, whatever continues it; give its slot."""
        stretch = self.of[key]
        if stretch.keys[-1] != key:
            self._cut(stretch, stretch.keys.index(key) + 1)
        slot = stretch.slots[-1]
        self.shorten(stretch, [key])
        return slot

    def _cut(self, stretch: Stretch, at: int) -> Stretch:
        """Make what is behind the first ``at`` blocks a stretch of its own, and give that."""
        keys, slots = stretch.keys[at:], stretch.slots[at:]
        del stretch.keys[at:], stretch.slots[at:]
        self.put(keys, slots, stretch.keys[-1])
        if stretch.ready:
            del self.filling[slots[0]]
            self.of[keys[0]].ready = True
        return self.of[keys[0]]

    def clear(self) -> None:
        """All blocks leave."""
        self.of.clear()
        self.begun.clear()
        self.filling.clear()

    def slots(self, *, ready: bool) -> dict[bytes, int]:
        """The slot of each block that is ready, or is not."""
        return {
            key: slot
            for stretch in dict.fromkeys(self.of.values())
            if stretch.ready == ready
            for key, slot in zip(stretch.keys, stretch.slots, strict=True)
        }

    def check(self) -> None:
        """Raise ``AssertionError`` where what is always true is not; linear in blocks."""
        begun: dict[bytes, int] = {}
        stretches = dict.fromkeys(self.of.values())
        for stretch in stretches:
            assert all(self.of[key] is stretch for key in stretch.keys), "a block is elsewhere"
            assert 0 < len(stretch.keys) == len(stretch.slots) <= _MOST, "a stretch has no slots"
            if stretch.after is not None:
                begun[stretch.after] = begun.get(stretch.after, 0) + 1
        filling = {stretch.slots[0]: stretch for stretch in stretches if not stretch.ready}
        assert filling == self.filling, "what is being filled is miscounted"
        assert sum(len(stretch.keys) for stretch in stretches) == len(self.of), "a block is twice"
        assert begun == self.begun, "what has begun is miscounted"
