r"""Copies between pages on a device and slots of host memory, concurrent with the engine's work::

    engine   forward 1 ]---------------[ fence: waits ]  forward 2: layer 0 ][ layer 1 ...
    stores              \--[ gather ]--/               /                    /
    loads      [ scatter: layer 0 ]-------------------/                    /
                                  [ scatter: layer 1 ]--------------------/ wait_for_layer(1)

A diagonal line is an event: one stream waits on the device for another. The engine's thread does
not block.

Invariants:

* A copy begins after all work that the engine had queued before the call.
* Work that the engine queues after an awaited `scatter` begins when the pages are loaded. Announced
  layers are the exception: their pages are loaded for work that the engine queues after
  `wait_for_layer` of that layer, `gather` or `fence`.
* A `scatter` that is not awaited never delays an awaited one.
* Nothing writes a page while a store reads it. Loads wait for the store. So does the engine, if it
  passes the blocks that it will overwrite to `fence`.
* No slot is used after its copy is done, also when a call raises.
* Only the engine's thread starts copies, so their order in the streams is the order of its work.
  Other threads may call `wait_for_layer`.
* Memory that `pin_slots` pinned stays pinned until `close`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from kvcache.connectors.transfer.base import CopyGeometry, CopyRows, Integers, PageCopier
from kvcache.connectors.transfer.merged_runs import MergedRuns
from kvcache.connectors.transfer.pinning import SlabPinning
from kvcache.connectors.transfer.streams import CopyStream, Device, StreamEvent

MIN_CALL_NBYTES: Final = 8 << 20
"""The least bytes of layers that a load copies in a call of their own. They take 0.2 to 0.3 ms over
PCIe, several times what starting the call takes."""

MAX_CALLS: Final = 8
"""The most calls of one load. With a large load, the forward pass then waits for one eighth of it
before it begins; halving that would double the calls."""

MIN_CUT_RUN_NBYTES: Final = 256 << 10
"""The least bytes of the runs into which a layer-wise load cuts the adjacent layers of a block. A
run takes the copy engine about 1.2 us besides its bytes, and 256 KiB take 5 to 10 us over PCIe
(docs/decisions/0018-blocks-outermost.md)."""

_MAX_KEPT_RUNS: Final = 256  # merged runs of one copier; each is small

CopyArguments = tuple[Integers, Integers, Integers]
"""Target addresses, source addresses and byte counts, as `CopyStream.copy` takes them."""


@dataclass(frozen=True, slots=True)
class _DeviceCopy:
    """A copy on a stream. It keeps the arrays alive that the driver may still read."""

    begin: StreamEvent
    ends: tuple[StreamEvent, ...]  # one for each call
    blocks: frozenset[int]
    arguments: tuple[CopyArguments, ...]

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
    """Copies on three streams: stores, awaited loads, and loads that are not awaited."""

    def __init__(self, *geometries: CopyGeometry, device: Device) -> None:
        super().__init__(*geometries)
        self._device = device
        layers = 1 + max(int(geometry.layers.max()) for geometry in geometries)
        self._layer_nbytes = [  # of each layer, for each geometry
            np.bincount(geometry.layers, geometry.nbytes, minlength=layers)
            for geometry in geometries
        ]
        self._all_layers = tuple(range(layers))
        self._merged_runs: dict[tuple[int, tuple[int, ...]], MergedRuns] = {}
        self._most_calls = [self._calls_of_long_runs(n) for n in range(len(geometries))]
        slab = geometries[0]
        self._pinning = SlabPinning(
            device, address=slab.slab_address, slots=slab.slots, slot_nbytes=slab.slot_nbytes
        )
        self._store_stream = device.new_stream(background=True)
        self._load_stream = device.new_stream()
        self._background_stream = device.new_stream(background=True)
        self._stores: list[_DeviceCopy] = []  # those that were in flight at the last check
        # The event after which each layer of the last awaited load is loaded, in the order of the
        # calls. Earlier loads precede it in the stream.
        self._layer_loaded: dict[int, StreamEvent] = {}

    def _gather(self, rows: Sequence[CopyRows]) -> _DeviceCopy:
        self.wait_for_layer()
        blocks = _blocks_of(rows)
        copy = self._copy(self._store_stream, "gather", rows, blocks, [self._all_layers])
        self._stores = [*self._stores_in_flight(), copy]
        return copy

    def _scatter(
        self, rows: Sequence[CopyRows], awaited: bool, announced: Collection[int]
    ) -> _DeviceCopy:
        stream = self._load_stream if awaited else self._background_stream
        written = _blocks_of(rows)
        for store in self._stores_reading(written):
            stream.wait_for(store.end)
        calls = self._layers_per_call(rows, announced if awaited else ())
        copy = self._copy(stream, "scatter", rows, written, calls)
        if awaited:
            if not set(calls[0]) <= set(announced):
                self._device.engine_stream().wait_for(copy.ends[0])
            ends = zip(calls, copy.ends, strict=True)
            self._layer_loaded = {layer: end for layers, end in ends for layer in layers}
        return copy

    def wait_for_layer(self, layer: int | None = None) -> None:
        last = next(reversed(self._layer_loaded.values()), None)
        end = last if layer is None else self._layer_loaded.get(layer)
        if end is not None:
            self._device.engine_stream().wait_for(end)

    def fence(self, blocks: Collection[int]) -> None:
        self.wait_for_layer()
        self._layer_loaded = {}
        for store in self._stores_reading(blocks):
            self._device.engine_stream().wait_for(store.end)

    def pin_slots(self, slots: int) -> None:
        self._pinning.pin_slots(slots)

    def close(self) -> None:
        super().close()
        for stream in (self._store_stream, self._load_stream, self._background_stream):
            stream.record().wait()
        self._pinning.close()

    def _stores_reading(self, blocks: Collection[int]) -> list[_DeviceCopy]:
        """Return the stores in flight that read one of `blocks`."""
        self._stores = self._stores_in_flight()
        return [store for store in self._stores if not store.blocks.isdisjoint(blocks)]

    def _stores_in_flight(self) -> list[_DeviceCopy]:
        return [store for store in self._stores if not store.done]

    def _layers_per_call(
        self, rows: Sequence[CopyRows], announced: Collection[int]
    ) -> list[tuple[int, ...]]:
        """Distribute all layers of a copy over calls.

        The first call has every layer that is not announced. The announced ones follow in order,
        in calls of at least MIN_CALL_NBYTES, at most MAX_CALLS calls. If adjacent layers could be
        copied as one run, the calls cut no run shorter than MIN_CUT_RUN_NBYTES.
        """
        if not announced:
            return [self._all_layers]
        sizes = [len(row.blocks) * self._layer_nbytes[row.geometry] for row in rows]
        nbytes = sum(sizes[1:], sizes[0]).tolist()
        largest = max(zip(sizes, rows, strict=True), key=lambda pair: float(pair[0].sum()))[1]
        least = max(MIN_CALL_NBYTES, sum(nbytes) / self._most_calls[largest.geometry])
        calls: list[list[int]] = [[]]
        size = 0
        for layer in sorted(range(len(nbytes)), key=lambda layer: layer in announced):
            if layer in announced and size >= least:
                calls.append([])
                size = 0
            calls[-1].append(layer)
            size += nbytes[layer]
        return [tuple(call) for call in calls]

    def _calls_of_long_runs(self, geometry: int) -> int:
        """Return into how many calls a load of this geometry may be divided."""
        merged = int(self._runs(geometry, self._all_layers).nbytes.max())
        if merged == self.geometries[geometry].nbytes.max():  # the longest run is no merged one
            return MAX_CALLS
        return min(MAX_CALLS, max(1, merged // MIN_CUT_RUN_NBYTES))

    def _runs(self, geometry: int, layers: tuple[int, ...]) -> MergedRuns:
        """Return the merged runs of these layers. A call copies them together."""
        runs = self._merged_runs.get((geometry, layers))
        if runs is None:
            if len(self._merged_runs) >= _MAX_KEPT_RUNS:
                self._merged_runs.clear()
            runs = MergedRuns(self.geometries[geometry], layers)
            self._merged_runs[geometry, layers] = runs
        return runs

    def _copy(
        self,
        stream: CopyStream,
        operation: Literal["gather", "scatter"],
        rows: Sequence[CopyRows],
        blocks: frozenset[int],
        calls: Sequence[tuple[int, ...]],
    ) -> _DeviceCopy:
        """Start a copy of `rows`, one call for each list of layers in `calls`.

        `blocks` are those of all rows.
        """
        arguments = tuple(self._call_arguments(operation, rows, layers) for layers in calls)
        stream.wait_for(self._device.engine_stream().record())
        begin, ends = stream.record(), []
        try:
            for call in arguments:
                stream.copy(*call)
                ends.append(stream.record())
        except BaseException:
            # A part of the copy may be in flight, and the caller reuses the slots after an error.
            stream.record().wait()
            raise
        return _DeviceCopy(begin, tuple(ends), blocks, arguments)

    def _call_arguments(
        self,
        operation: Literal["gather", "scatter"],
        rows: Sequence[CopyRows],
        layers: tuple[int, ...],
    ) -> CopyArguments:
        """Compute target and source address and size of every run of these layers and rows."""
        runs = [self._runs(row.geometry, layers) for row in rows]
        counts = [len(row.blocks) * len(of_row) for row, of_row in zip(rows, runs, strict=True)]
        # One buffer for the three columns.
        columns: Integers = np.empty((3, sum(counts)), dtype=np.int64)
        begin = 0
        for row, of_row, count in zip(rows, runs, counts, strict=True):
            of_row.write_rows(row.blocks, row.slots, *columns[:, begin : begin + count])
            begin += count
        engine, slab, nbytes = columns
        return (slab, engine, nbytes) if operation == "gather" else (engine, slab, nbytes)


def _blocks_of(rows: Sequence[CopyRows]) -> frozenset[int]:
    return frozenset().union(*[row.blocks.tolist() for row in rows])
