r"""Page copies between pages on a device and slots of host memory, beside the engine's own work::

    engine   forward 1 ]m--------------[ fence: waits ]  forward 2 ]
    stores              \--[ gather 1 ]/
    loads    [ scatter ]-->[ the engine waits, then forward ]

Every arrow is an event on the device: the engine's thread waits for nobody.

Always true here:
* A copy begins when what the engine had begun before the call is done; what the engine begins after
  a `scatter` that is awaited begins when its pages are there.
* A store's pages are written by nobody while it reads them: not by loads, which wait for it, nor by
  the engine, if it names in `fence` what it will write anew.
* Slots are touched until the copy is over, and no longer; so they are even when a call raises.
* One thread makes all calls, the engine's own: the streams are of its order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvcache.connectors.copier import Integers, PageCopier, Pages, Side, Sides, paired


class Mark(Protocol):
    """A point in the order of a stream."""

    def passed(self) -> bool:
        """Whether the device is past it; asking waits for nobody."""

    def wait(self) -> None:
        """Wait until it is; the caller's thread does."""

    def since(self, earlier: Any) -> float:
        """Seconds between two points that the device is past."""


class Stream(Protocol):
    """Work for a device, done in order."""

    def mark(self) -> Mark:
        """The point after all that was given to it until now."""

    def after(self, mark: Any) -> None:
        """What is given to it from now on is done when the device is past `mark`."""

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        """Copy `nbytes[i]` bytes from the address `sources[i]` to `targets[i]`, for every i."""


class Device(Protocol):
    """What computes and copies."""

    def engine(self) -> Stream:
        """The stream that the calling thread computes on."""

    def stream(self) -> Stream:
        """A stream of one's own."""

    def pin(self, address: int, nbytes: int) -> str:
        """Lock host memory for copies at full speed; why that failed, or nothing."""

    def unpin(self, address: int) -> None:
        """Undo `pin`."""


@dataclass(frozen=True, slots=True)
class _Copying:
    """A copy between two points of its stream; keeps what the driver may still read."""

    begin: Mark
    end: Mark
    blocks: frozenset[int]
    addresses: tuple[Integers, Integers, Integers]

    @property
    def over(self) -> bool:
        return self.end.passed()

    @property
    def seconds(self) -> float:
        return self.end.since(self.begin)


class DeviceCopier(PageCopier):
    """Copies on two streams, one for each direction; arguments as `Sides` has them."""

    def __init__(
        self,
        layers: Sequence[Pages],
        *,
        slab_address: int,
        slots: int,
        slot_nbytes: int,
        offset: int = 0,
        device: Device,
    ) -> None:
        self._sides = Sides(
            layers, slab_address=slab_address, slots=slots, slot_nbytes=slot_nbytes, offset=offset
        )
        self._device = device
        self._loads, self._stores = device.stream(), device.stream()
        self._storing: list[_Copying] = []  # under way when it was last looked
        self._closed = False

    def gather(self, blocks: Sequence[int], slots: Sequence[int]) -> _Copying:
        copying = self._copy(
            self._stores, self._sides.blocks, blocks, self._sides.slots, slots, blocks
        )
        self._storing = [*self._under_way(), copying]
        return copying

    def scatter(
        self, slots: Sequence[int], blocks: Sequence[int], *, awaited: bool = True
    ) -> _Copying:
        for storing in self._reading(blocks):
            self._loads.after(storing.end)
        copying = self._copy(
            self._loads, self._sides.slots, slots, self._sides.blocks, blocks, blocks
        )
        if awaited:
            self._device.engine().after(copying.end)
        return copying

    def fence(self, blocks: Collection[int]) -> None:
        for storing in self._reading(blocks):
            self._device.engine().after(storing.end)

    def close(self) -> None:
        self._closed = True
        for stream in (self._loads, self._stores):
            stream.mark().wait()

    def _reading(self, blocks: Collection[int]) -> list[_Copying]:
        """The stores under way that read some of `blocks`."""
        self._storing = self._under_way()
        return [storing for storing in self._storing if not storing.blocks.isdisjoint(blocks)]

    def _under_way(self) -> list[_Copying]:
        return [storing for storing in self._storing if not storing.over]

    def _copy(
        self,
        stream: Stream,
        source: Side,
        sources: Sequence[int],
        target: Side,
        targets: Sequence[int],
        blocks: Sequence[int],
    ) -> _Copying:
        if self._closed:
            raise RuntimeError("this page copier is closed")
        read, written = paired(source, sources, target, targets)
        addresses = (
            (target.addresses + written[:, None] * target.strides).ravel(),
            (source.addresses + read[:, None] * source.strides).ravel(),
            self._sides.nbytes[None, :].repeat(len(read), axis=0).ravel(),
        )
        stream.after(self._device.engine().mark())
        begin = stream.mark()
        try:
            stream.copy(*addresses)
            return _Copying(begin, stream.mark(), frozenset(blocks), addresses)
        except BaseException:
            stream.mark().wait()  # part of it may be under way, and the slots are another's next
            raise
