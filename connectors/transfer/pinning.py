"""Pins the memory of a slab for a device, piece by piece while the slab is populated.

Invariants:

* All pinned memory is unpinned before the slab is unmapped, if `close` is called before the slab's.
* Memory that cannot be pinned is still copied, only slower.
"""

from __future__ import annotations

import logging
import threading

from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.transfer.streams import Device

log = logging.getLogger(__name__)

_MIN_PIECE_NBYTES = 1 << 30  # a registration costs the driver the same at any size


class SlabPinning:
    """The part of a slab that is pinned for `device`."""

    def __init__(self, geometry: CopyGeometry, device: Device) -> None:
        self._geometry = geometry
        self._device = device
        self._lock = threading.Lock()
        self._pieces: list[int] = []  # addresses of the pinned pieces
        self._pinned_nbytes = 0  # from the beginning of the slab
        self._stopped = False  # after a failure, or `close`

    def pin_slots(self, slots: int) -> None:
        """Pin the first `slots` slots, in pieces of at least 1 GiB except for the last one."""
        geometry = self._geometry
        total = geometry.slots * geometry.slot_nbytes
        least = _MIN_PIECE_NBYTES if slots < geometry.slots else 1
        with self._lock:
            end = slots * geometry.slot_nbytes
            if self._stopped or end - self._pinned_nbytes < least:
                return
            address = geometry.slab_address + self._pinned_nbytes
            if cause := self._device.pin(address, end - self._pinned_nbytes):
                self._stopped = True
                log.warning(
                    "kvcache: pinning: %.1f of %.1f GiB of L1 pinned (%s); copies from and to the "
                    "rest are slower",
                    self._pinned_nbytes / 2**30, total / 2**30, cause,
                )  # fmt: skip
                return
            self._pieces.append(address)
            self._pinned_nbytes = end
            if end == total:
                log.info("kvcache: pinning: all %.1f GiB of L1 pinned", total / 2**30)

    def close(self) -> None:
        """Unpin everything and pin nothing more."""
        with self._lock:
            self._stopped = True
            while self._pieces:
                self._device.unpin(self._pieces.pop())
