"""A copy as arrays of addresses, and the host memory that a device can access by its addresses."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Literal

from kvcache.connectors.transfer.base import Integers

Direction = Literal["load", "store"]
DIRECTIONS: tuple[Direction, ...] = ("load", "store")


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """A copy of `nbytes[i]` bytes from address `sources[i]` to `targets[i]`, for every i.

    `direction` is None unless all of the host's side is pinned and has the same addresses on the
    device.
    """

    targets: Integers
    sources: Integers
    nbytes: Integers
    direction: Direction | None

    def __len__(self) -> int:
        return len(self.nbytes)


class PinnedRanges:
    """Host memory that the device can access at the host's addresses."""

    def __init__(self) -> None:
        # Begins and ends in order; adjacent extents are one range. Replaced as a whole, so that
        # readers need no lock.
        self._ranges: list[tuple[int, int]] = []
        self._extents: dict[int, int] = {}  # bytes by address

    def add(self, address: int, nbytes: int) -> None:
        """Add an extent that overlaps no other one."""
        self._extents[address] = nbytes
        begin, end, ranges = address, address + nbytes, self._ranges
        at = to = bisect_left(ranges, (address,))
        if at and ranges[at - 1][1] == begin:
            at -= 1
            begin = ranges[at][0]
        if to < len(ranges) and ranges[to][0] == end:
            end = ranges[to][1]
            to += 1
        self._ranges = [*ranges[:at], (begin, end), *ranges[to:]]

    def remove(self, address: int) -> None:
        """Remove the extent at `address`, if there is one."""
        nbytes = self._extents.pop(address, 0)
        if not nbytes:
            return
        at = bisect_right(self._ranges, (address, math.inf)) - 1
        begin, end = self._ranges[at]
        rest = [(begin, address), (address + nbytes, end)]
        rest = [(low, high) for low, high in rest if low < high]
        self._ranges = [*self._ranges[:at], *rest, *self._ranges[at + 1 :]]

    def batch(self, targets: Integers, sources: Integers, nbytes: Integers) -> CopyBatch:
        """Make a batch. The pinned side determines its direction."""
        direction: Direction | None = None
        if self._contains(targets, nbytes):
            direction = "store"
        elif self._contains(sources, nbytes):
            direction = "load"
        return CopyBatch(targets, sources, nbytes, direction)

    def _contains(self, addresses: Integers, nbytes: Integers) -> bool:
        """Whether all runs lie in one range."""
        if not len(addresses):
            return False
        ranges = self._ranges
        at = bisect_right(ranges, (int(addresses[0]), math.inf)) - 1
        if at < 0 or ranges[at][1] <= addresses[0]:
            return False
        begin, end = ranges[at]
        return bool(begin <= addresses.min() and (addresses + nbytes).max() <= end)
