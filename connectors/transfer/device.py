r"""Page copies between pages on a device and slots of host memory, beside the engine's own work::

    engine   forward 1 ]m--------------[ fence: waits ]  forward 2, layer 0 ][ layer 1 ...
    stores              \--[ gather 1 ]/                /                   /
    loads    [ scatter: layer 0 ]----------------------/                   /
                                [ layer 1 ]-------------------------------/ reach: waits

Every arrow is an event on the device: the engine's thread waits for nobody.

Always true here:
* A copy begins when what the engine had begun before the call is done; what the engine begins after
  a `scatter` that is awaited begins when its pages are there, but for those of layers that it has
  announced: they are there for what it begins after it has called `wait_for_layer` for their
  layer, `gather` or `fence`.
* A `scatter` that is not awaited holds up none that is.
* A store's pages are written by nobody while it reads them: not by loads, which wait for it, nor by
  the engine, if it names in `fence` what it will write anew.
* Slots are touched until the copy is over, and no longer; so they are even when a call raises.
* One thread makes all copies, the engine's own: the streams are of its order. Other threads
  may call `wait_for_layer`.
* What `pin_slots` pinned of the slab stays pinned until `close`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvcache.connectors.transfer.base import CopyGeometry, Integers, PageCopier
from kvcache.connectors.transfer.pinning import Pins
from kvcache.connectors.transfer.streams import CopyStream, Device, StreamEvent

MIN_CALL_NBYTES: Final = 8 << 20
"""Of layers that are copied in a call of their own, to be awaited by themselves: over PCIe some
0.2 to 0.3 ms, several times what it takes to begin the call."""

MAX_CALLS: Final = 8
"""Of a load: of one that is large only the first eighth is awaited before anything is computed, and
halving that would double the calls."""

Addresses = tuple[Integers, Integers, Integers]


@dataclass(frozen=True, slots=True)
class _Copying:
    """A copy between two points of its stream; keeps what the driver may still read."""

    begin: StreamEvent
    ends: tuple[StreamEvent, ...]  # of its calls
    blocks: frozenset[int]
    addresses: tuple[Addresses, ...]

    @property
    def end(self) -> StreamEvent:
        return self.ends[-1]

    @property
    def done(self) -> bool:
        return self.end.done()

    @property
    def seconds(self) -> float:
        return self.end.seconds_since(self.begin)

    def wait(self) -> None:
        self.end.wait()


class DeviceCopier(PageCopier):
    """Copies on a stream for stores, one for loads, and one for loads that nobody awaits."""

    def __init__(self, sides: CopyGeometry, device: Device) -> None:
        super().__init__(blocks=sides.blocks, slots=sides.slots)
        self._sides = sides
        self._device = device
        self._layer_nbytes = np.bincount(sides.layers, sides.nbytes)
        self._pins = Pins(sides, device)
        self._stores, self._loads, self._later = (device.new_stream() for _ in range(3))
        self._storing: list[_Copying] = []  # under way when it was last looked
        self._coming: dict[int, StreamEvent] = {}  # by layer, of the last load: it has them all

    def _gather(self, blocks: Integers, slots: Integers) -> _Copying:
        self.wait_for_layer()
        where = (slots, *self._sides.slab, blocks, *self._sides.engine)
        copying = self._copy(self._stores, where, frozenset(blocks.tolist()), self._calls(0, ()))
        self._storing = [*self._under_way(), copying]
        return copying

    def _scatter(
        self, slots: Integers, blocks: Integers, awaited: bool, announced: Collection[int]
    ) -> _Copying:
        written = frozenset(blocks.tolist())
        stream = self._loads if awaited else self._later
        for storing in self._reading(written):
            stream.wait_for(storing.end)
        calls = self._calls(len(blocks), announced if awaited else ())
        where = (blocks, *self._sides.engine, slots, *self._sides.slab)
        copying = self._copy(stream, where, written, calls)
        if awaited:
            if not set(calls[0]) <= set(announced):
                self._device.engine_stream().wait_for(copying.ends[0])
            ends = zip(calls, copying.ends, strict=True)
            self._coming = {layer: end for layers, end in ends for layer in layers}
        return copying

    def wait_for_layer(self, layer: int | None = None) -> None:
        last = next(reversed(self._coming.values()), None)
        end = last if layer is None else self._coming.get(layer)
        if end is not None:
            self._device.engine_stream().wait_for(end)

    def fence(self, blocks: Collection[int]) -> None:
        self.wait_for_layer()
        self._coming = {}
        for storing in self._reading(blocks):
            self._device.engine_stream().wait_for(storing.end)

    def pin_slots(self, slots: int) -> None:
        self._pins.pin_slots(slots)

    def close(self) -> None:
        super().close()
        for stream in (self._stores, self._loads, self._later):
            stream.record().wait()
        self._pins.close()

    def _reading(self, blocks: Collection[int]) -> list[_Copying]:
        """The stores under way that read some of `blocks`."""
        self._storing = self._under_way()
        return [storing for storing in self._storing if not storing.blocks.isdisjoint(blocks)]

    def _under_way(self) -> list[_Copying]:
        return [storing for storing in self._storing if not storing.done]

    def _calls(self, blocks: int, announced: Collection[int]) -> list[list[int]]:
        """Which layers a load of so many blocks copies in which call.

        Those that are not announced come in the first; all others after them, in their order.
        """
        nbytes = (blocks * self._layer_nbytes).tolist()
        least = max(MIN_CALL_NBYTES, sum(nbytes) / MAX_CALLS)
        calls: list[list[int]] = [[]]
        size = 0
        for layer in sorted(range(len(nbytes)), key=lambda layer: layer in announced):
            if layer in announced and size >= least:
                calls.append([])
                size = 0
            calls[-1].append(layer)
            size += nbytes[layer]
        return calls

    def _copy(
        self,
        stream: CopyStream,
        where: tuple[Integers, ...],
        blocks: frozenset[int],
        calls: Sequence[Sequence[int]],
    ) -> _Copying:
        """Targets, their addresses and strides; sources, and theirs. In `calls` of these layers."""
        addresses = tuple(self._addresses(where, layers) for layers in calls)
        stream.wait_for(self._device.engine_stream().record())
        begin, marks = stream.record(), []
        try:
            for call in addresses:
                stream.copy(*call)
                marks.append(stream.record())
        except BaseException:
            stream.record().wait()  # part of it may be under way, and the slots are another's next
            raise
        return _Copying(begin, tuple(marks), blocks, addresses)

    def _addresses(self, where: tuple[Integers, ...], layers: Sequence[int]) -> Addresses:
        """Of the runs of these layers, of every block: where to, where from, and how many bytes."""
        written, to, to_strides, read, at, at_strides = where
        chosen = np.zeros(self._layer_nbytes.size, dtype=bool)
        chosen[layers] = True
        runs = chosen[self._sides.layers]
        return (
            (to[runs] + written[:, None] * to_strides[runs]).ravel(),
            (at[runs] + read[:, None] * at_strides[runs]).ravel(),
            self._sides.nbytes[None, runs].repeat(len(read), axis=0).ravel(),
        )
