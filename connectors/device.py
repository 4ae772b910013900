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
* One thread makes all copies, the engine's own: the streams are of its order.
* The slab is pinned as far as it is `ready`, until `close`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvcache.connectors.copier import Integers, PageCopier, Sides
from kvcache.connectors.pins import Pins
from kvcache.connectors.streams import Device, Mark, Stream


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

    def wait(self) -> None:
        self.end.wait()


class DeviceCopier(PageCopier):
    """Copies on two streams, one for each direction."""

    def __init__(self, sides: Sides, device: Device) -> None:
        super().__init__(blocks=sides.blocks, slots=sides.slots)
        self._sides = sides
        self._device = device
        self._pins = Pins(sides, device)
        self._loads, self._stores = device.stream(), device.stream()
        self._storing: list[_Copying] = []  # under way when it was last looked

    def _gather(self, blocks: Integers, slots: Integers) -> _Copying:
        ends = (slots, *self._sides.slab, blocks, *self._sides.engine)
        copying = self._copy(self._stores, ends, frozenset(blocks.tolist()))
        self._storing = [*self._under_way(), copying]
        return copying

    def _scatter(self, slots: Integers, blocks: Integers, awaited: bool) -> _Copying:
        written = frozenset(blocks.tolist())
        for storing in self._reading(written):
            self._loads.after(storing.end)
        ends = (blocks, *self._sides.engine, slots, *self._sides.slab)
        copying = self._copy(self._loads, ends, written)
        if awaited:
            self._device.engine().after(copying.end)
        return copying

    def fence(self, blocks: Collection[int]) -> None:
        for storing in self._reading(blocks):
            self._device.engine().after(storing.end)

    def ready(self, slots: int) -> None:
        self._pins.ready(slots)

    def close(self) -> None:
        super().close()
        for stream in (self._loads, self._stores):
            stream.mark().wait()
        self._pins.close()

    def _reading(self, blocks: Collection[int]) -> list[_Copying]:
        """The stores under way that read some of `blocks`."""
        self._storing = self._under_way()
        return [storing for storing in self._storing if not storing.blocks.isdisjoint(blocks)]

    def _under_way(self) -> list[_Copying]:
        return [storing for storing in self._storing if not storing.over]

    def _copy(self, stream: Stream, ends: tuple[Integers, ...], blocks: frozenset[int]) -> _Copying:
        """Targets, their addresses and strides; sources, and theirs."""
        written, to, to_strides, read, at, at_strides = ends
        addresses = (
            (to + written[:, None] * to_strides).ravel(),
            (at + read[:, None] * at_strides).ravel(),
            self._sides.nbytes[None, :].repeat(len(read), axis=0).ravel(),
        )
        stream.after(self._device.engine().mark())
        begin = stream.mark()
        try:
            stream.copy(*addresses)
            return _Copying(begin, stream.mark(), blocks, addresses)
        except BaseException:
            stream.mark().wait()  # part of it may be under way, and the slots are another's next
            raise
