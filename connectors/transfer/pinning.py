"""A slab's memory locked for a device, piece by piece as it is made.

Always true here: what is pinned is unpinned before the memory is unmapped, if `close` is called
before the slab's; and what cannot be pinned is copied from and to nonetheless, slower.
"""

from __future__ import annotations

import logging
import threading

from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.streams import Device

log = logging.getLogger(__name__)

_PIECE = 1 << 30  # a registration costs the driver something, whatever its size


class Pins:
    """Pins for `device` the slots that are ready."""

    def __init__(self, sides: CopyGeometry, device: Device) -> None:
        self._sides = sides
        self._device = device
        self._lock = threading.Lock()
        self._pieces: list[int] = []  # their addresses
        self._end = 0  # bytes from the slab's begin that are pinned
        self._refused = False

    def pin_slots(self, slots: int) -> None:
        """The memory of the first `slots` slots is there."""
        of = self._sides
        whole = of.slots * of.slot_nbytes
        with self._lock:
            end = slots * of.slot_nbytes
            if self._refused or end - self._end < (_PIECE if slots < of.slots else 1):
                return
            address = of.slab_address + self._end
            if why := self._device.pin(address, end - self._end):
                self._refused = True
                log.warning(
                    "kvcache: %.1f of %.1f GiB of L1 are pinned, and no more can be: %s; copies "
                    "from and to the rest are slower",
                    self._end / 2**30, whole / 2**30, why,
                )  # fmt: skip
                return
            self._pieces.append(address)
            self._end = end
            if end == whole:
                log.info("kvcache: %.1f GiB of L1 are pinned", whole / 2**30)

    def close(self) -> None:
        """Unpin all, and pin no more."""
        with self._lock:
            self._refused = True
            while self._pieces:
                self._device.unpin(self._pieces.pop())
