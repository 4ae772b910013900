"""A slab's memory locked for a device, piece by piece as it is made.

Always true here: what is pinned is unpinned before the memory is unmapped, if `close` is called
before the slab's; and what cannot be pinned is copied from and to nonetheless, slower.
"""

from __future__ import annotations

import logging
import threading

from kvcache.connectors.device import Device
from kvcache.slab import Slab

log = logging.getLogger(__name__)

_PIECE = 1 << 30  # a registration costs the driver something, whatever its size


class Pins:
    """Pins `slab` for `device` while `slab.populate(pins.ready)` makes it."""

    def __init__(self, slab: Slab, device: Device) -> None:
        self._slab = slab
        self._device = device
        self._lock = threading.Lock()
        self._pieces: list[int] = []  # their addresses
        self._end = 0  # bytes from the slab's begin that need no pinning any more
        self._refused = False

    def ready(self, slots: int) -> None:
        """The memory of the first `slots` slots is there."""
        with self._lock:
            end = slots * self._slab.slot_nbytes
            if self._refused or end - self._end < (_PIECE if slots < self._slab.slots else 1):
                return
            address = self._slab.address + self._end
            if why := self._device.pin(address, end - self._end):
                self._refused = True
                log.warning(
                    "kvcache: %.1f of %.1f GiB of L1 are pinned, and no more can be: %s; copies "
                    "from and to the rest are slower",
                    self._end / 2**30, self._slab.nbytes / 2**30, why,
                )  # fmt: skip
                return
            self._pieces.append(address)
            self._end = end
            if slots == self._slab.slots:
                log.info("kvcache: %.1f GiB of L1 are pinned", self._slab.nbytes / 2**30)

    def close(self) -> None:
        """Unpin all, and pin no more."""
        with self._lock:
            self._refused = True
            while self._pieces:
                self._device.unpin(self._pieces.pop())
