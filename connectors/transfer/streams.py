"""A device that does work in streams, as far as copies need to know it.

Always true of one: what is given to one stream is done in that order; between streams nothing is
in order but what `after` says.
"""

from __future__ import annotations

from typing import Any, Protocol

from kvcache.connectors.transfer.base import Integers


class StreamEvent(Protocol):
    """A point in the order of a stream."""

    def done(self) -> bool:
        """Whether the device is past it; asking waits for nobody."""

    def wait(self) -> None:
        """Wait until it is; the caller's thread does."""

    def seconds_since(self, earlier: Any) -> float:
        """Seconds between two points that the device is past."""


class CopyStream(Protocol):
    """Work for a device, done in order."""

    def record(self) -> StreamEvent:
        """The point after all that was given to it until now."""

    def wait_for(self, mark: Any) -> None:
        """What is given to it from now on is done when the device is past `mark`."""

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        """Copy `nbytes[i]` bytes from the address `sources[i]` to `targets[i]`, for every i."""


class Device(Protocol):
    """What computes and copies."""

    def engine_stream(self) -> CopyStream:
        """The stream that the calling thread computes on."""

    def new_stream(self) -> CopyStream:
        """A stream of one's own."""

    def pin(self, address: int, nbytes: int) -> str:
        """Lock host memory for copies at full speed; why that failed, or nothing."""

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
