"""The interface of a device that works in streams, as far as copies need it.

Invariant of every device: it does the work of one stream in the order of the calls. Work of
different streams has no order, except where `wait_for` makes one.
"""

from __future__ import annotations

from typing import Any, Protocol

from kvcache.connectors.transfer.base import Integers


class StreamEvent(Protocol):
    """A point in the order of a stream, as a CUDA event is."""

    def done(self) -> bool:
        """Whether the device has passed this point. Does not block."""

    def wait(self) -> None:
        """Block the calling thread until the device has passed this point."""

    def seconds_since(self, earlier: Any) -> float:
        """Seconds between two points that the device has passed."""


class CopyStream(Protocol):
    """A queue of work that the device does in order."""

    def record(self) -> StreamEvent:
        """Return the point after all work queued so far."""

    def wait_for(self, event: Any) -> None:
        """Make the work queued from now on wait until the device has passed `event`."""

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        """Queue copies of `nbytes[i]` bytes from address `sources[i]` to `targets[i]`.

        One side is in the device's memory. The arrays are contiguous and have 64-bit integers; the
        caller keeps them until the copies are done.
        """


class Device(Protocol):
    """The device that computes and copies."""

    @property
    def pci_address(self) -> str:
        """The address on the PCI bus, such as ``0000:3b:00.0``; "" if it is unknown."""

    def engine_stream(self) -> CopyStream:
        """Return the stream on which the calling thread computes."""

    def new_stream(self, *, background: bool = False) -> CopyStream:
        """Return a new stream.

        Args:
            background: for copies that the engine does not wait for. The stream has the lowest
                priority of the device.
        """

    def pin(self, address: int, nbytes: int) -> str:
        """Pin host memory for copies at full speed. Returns the cause of a failure, or ""."""

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
