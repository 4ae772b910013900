"""What leaves an index to make room.

Always true here: of a chain the last block leaves first, and none that is pinned, that another
block continues, or that is about to be continued; whatever a policy offers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvcache.stretches import Stretch, Stretches


class Leaving:
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

    def __init__(self, stretches: Stretches, pins: Mapping[int, int], need: int) -> None:
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

    def _loose(self, stretch: Stretch, offered: Sequence[bytes]) -> int:
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
