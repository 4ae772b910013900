"""Pins the memory of a slab for a device, extent by extent.

Invariants:

* Only slots that the caller reports as allocated are pinned.
* An extent is a whole number of slots, so no run of a copy lies in two of them: CUDA may refuse
  that.
* All pinned memory is unpinned before the slab is unmapped, if `close` is called before the slab's.
* Memory that cannot be pinned is still copied, only slower.

Every rank pins the whole slab, although it copies only its own shard of each slot: the shards of
all ranks alternate in memory, so that a rank would have to pin each of its shards separately.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from kvcache.connectors.transfer.streams import Device

log = logging.getLogger(__name__)

EXTENT_NBYTES: Final = 64 << 20
"""About how many bytes are pinned at a time.

While the CUDA driver pins memory, it holds a lock for which every launch on the machine waits. An
H200 was reported to pin at 10 GB/s (vllm#51080), so an extent of 64 MiB delays a launch by 7 ms,
less than a decode step, and one of 1 GiB by 107 ms. 100 GiB are 1,600 extents."""


class SlabPinning:
    """The part of a slab that is pinned for `device`.

    Args:
        device: that copies from and to the slab.
        address: of slot 0.
        slots: how many the slab has.
        slot_nbytes: bytes of a slot.
        pause: called after each extent with the seconds that it took, so that it can make room for
            the device's other work.

    Attributes:
        pinned_nbytes: how many bytes are pinned, from the beginning of the slab.
        error: why the rest is not pinned; "" if no extent has failed.
    """

    def __init__(
        self,
        device: Device,
        *,
        address: int,
        slots: int,
        slot_nbytes: int,
        pause: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._device = device
        self._address, self._slots, self._slot_nbytes = address, slots, slot_nbytes
        self._extent_slots = max(1, EXTENT_NBYTES // slot_nbytes)
        self._pause = pause
        self._lock = threading.Lock()
        self._extents: list[int] = []  # addresses of the pinned extents
        self._closed = False
        self.pinned_nbytes = 0
        self.error = ""

    def pin_slots(self, slots: int) -> None:
        """Pin the first `slots` slots, apart from the last ones that do not fill an extent."""
        while (seconds := self._pin_extent(slots)) is not None:
            self._pause(seconds)

    def _pin_extent(self, slots: int) -> float | None:
        """Pin the next extent; return how long that took, and None if there was none to pin."""
        with self._lock:
            first = self.pinned_nbytes // self._slot_nbytes
            end = min(first + self._extent_slots, self._slots)
            if self._closed or self.error or first == self._slots or end > slots:
                return None
            nbytes, address = (end - first) * self._slot_nbytes, self._address + self.pinned_nbytes
            total = self._slots * self._slot_nbytes
            begun = time.perf_counter()
            if cause := self._device.pin(address, nbytes):
                self.error = cause
                log.warning(
                    "kvcache: pinning: %.1f of %.1f GiB of L1 pinned (%s); copies from and to the "
                    "rest are slower",
                    self.pinned_nbytes / 2**30, total / 2**30, cause,
                )  # fmt: skip
                return None
            self._extents.append(address)
            self.pinned_nbytes += nbytes
            if end == self._slots:
                log.info("kvcache: pinning: all %.1f GiB of L1 pinned", total / 2**30)
            return time.perf_counter() - begun

    def close(self) -> None:
        """Unpin everything and pin nothing more."""
        with self._lock:
            self._closed = True
            while self._extents:
                self._device.unpin(self._extents.pop())
