"""The interface of every copier between the pages of an engine and the slots of a slab.

A block lies in the engine's cache in one or more runs of bytes per layer (`BlockRun`). A slot
holds one block of all ranks. This rank's shard begins at `offset` in the slot and consists of those
runs, one after another (`CopyGeometry`). An engine with blocks of several kinds has one geometry
for each kind, and a call names the geometry of every block.

* `gather` copies pages into slots: a store. `scatter` copies slots into pages: a load.
* Work that the engine begins after an awaited `scatter` sees the loaded pages. For a layer that
  the engine has announced, this holds only after its call of `wait_for_layer`.
* `fence` makes the engine's later work wait until no copy uses the blocks that it will overwrite.
* `pin_slots` pins memory of the slab, where a device copies faster from pinned memory.

Invariants of every copier:

- Only whole pages are copied. Nothing outside them is read or written.
- A call with invalid arguments copies nothing. After an exception no part of the
  copy is in flight.
- After `close` returns no copy runs and none can begin, so the memory may be unmapped.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache.connectors.layout.placement import BlockRun
from kvcache.process import bind_to_process

Integers = NDArray[np.int64]
"""Addresses, byte counts, or numbers of blocks and slots."""


class Copy(Protocol):
    """A copy in flight, or done."""

    @property
    def done(self) -> bool:
        """Whether every byte has been copied. Does not block."""

    @property
    def seconds(self) -> float:
        """The duration of the copy, once it is done."""

    def wait(self) -> None:
        """Block until the copy is done."""


@dataclass(frozen=True, slots=True)
class CompletedCopy:
    """A copy that was done when the call returned."""

    seconds: float
    done: bool = True

    def wait(self) -> None:
        return


class CopyRows(NamedTuple):
    """The blocks and slots of a copy that have one geometry. `geometry` is its number."""

    geometry: int
    blocks: Integers
    slots: Integers


class PageCopier(ABC):
    """Copies blocks between the pages of one rank and its shards of the slots.

    Thread-safe, unless a subclass restricts it.

    `gather` and `scatter` take two sequences of equal length and copy the i-th block to or from
    the i-th slot. `geometries` has pairs: the number of a geometry, and how many of the next
    blocks have it; by default all have the first one. They raise ValueError when the lengths
    differ or when a target appears twice with one geometry, IndexError for a block, slot or
    geometry that does not exist, and RuntimeError after `close`. A subclass implements `_gather`
    and `_scatter`, which get validated arguments.

    Copies of pages are ordered with the engine's work: a copy sees what the engine had begun to
    write before the call. The caller must not touch the slots until the copy is done.
    """

    def __init__(self, *geometries: CopyGeometry) -> None:
        if not geometries:
            raise ValueError("there are no pages to copy")
        self.geometries = geometries
        self._running = 0
        self._closed = False
        self._condition = threading.Condition()
        bind_to_process(self)

    def gather(
        self,
        blocks: Sequence[int],
        slots: Sequence[int],
        geometries: Sequence[tuple[int, int]] | None = None,
    ) -> Copy:
        """Copy the engine's pages of `blocks` into `slots`."""
        with self._in_flight():
            return self._gather(self._rows("slot", blocks, slots, geometries))

    def scatter(
        self,
        slots: Sequence[int],
        blocks: Sequence[int],
        geometries: Sequence[tuple[int, int]] | None = None,
        *,
        awaited: bool = True,
        announced: Collection[int] = (),
    ) -> Copy:
        """Copy the shards in `slots` into the engine's pages of `blocks`.

        Args:
            awaited: whether the engine's work after this call must see the pages. If not, the
                engine must not touch them until the copy is done.
            announced: layers for which the engine will call `wait_for_layer`. It does not touch
                their pages before that call.
        """
        with self._in_flight():
            rows = self._rows("block", blocks, slots, geometries)
            return self._scatter(rows, awaited, announced)

    def wait_for_layer(self, layer: int | None = None) -> None:
        """Make the engine wait until the awaited pages of `layer` are loaded; None: of all layers.

        Any thread of the engine may call this. A thread that computes on a stream of its own must.
        """
        return  # nothing to wait for, if copies are done when a call returns

    def fence(self, blocks: Collection[int]) -> None:
        """Make the engine wait until no copy uses `blocks`, which it is about to overwrite."""
        return  # nothing to wait for, if copies are done when a call returns

    def pin_slots(self, slots: int) -> None:
        """Pin the first `slots` slots, if that makes copies faster. Their memory exists now."""
        return

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed

    def close(self) -> None:
        """Wait for running copies and refuse new ones. Further calls do nothing."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: not self._running)

    @abstractmethod
    def _gather(self, rows: Sequence[CopyRows]) -> Copy: ...

    @abstractmethod
    def _scatter(
        self, rows: Sequence[CopyRows], awaited: bool, announced: Collection[int]
    ) -> Copy: ...

    def _rows(
        self,
        target: Literal["block", "slot"],
        blocks: Sequence[int],
        slots: Sequence[int],
        geometries: Sequence[tuple[int, int]] | None,
    ) -> list[CopyRows]:
        """Validate the arguments of a copy, and return its rows, one entry for each pair."""
        if len(blocks) != len(slots):
            raise ValueError(f"{len(blocks)} blocks do not pair up with {len(slots)} slots")
        pairs = [(0, len(blocks))] if geometries is None else geometries
        if (named := sum(count for _, count in pairs)) != len(blocks):
            raise ValueError(f"geometries are named for {named} of {len(blocks)} blocks")
        all_blocks, all_slots = integers(blocks), integers(slots)
        target_numbers = blocks if target == "block" else slots
        seen: dict[int, set[int]] = {}  # targets, by geometry
        rows, begin = [], 0
        for number, count in pairs:
            if not 0 <= number < len(self.geometries):
                _raise_missing("geometry", number, len(self.geometries))
            geometry, end = self.geometries[number], begin + count
            row = CopyRows(number, all_blocks[begin:end], all_slots[begin:end])
            _check_numbers("block", row.blocks, geometry.blocks)
            _check_numbers("slot", row.slots, geometry.slots)
            targets = set(target_numbers[begin:end])
            if len(targets) < count or not targets.isdisjoint(seen.get(number, ())):
                numbers = list(target_numbers)
                raise ValueError(f"a {target} is the target of two copies: {numbers}")
            seen[number] = targets | seen[number] if number in seen else targets
            rows.append(row)
            begin = end
        return rows or [CopyRows(0, all_blocks, all_slots)]

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        with self._condition:
            if self._closed:
                raise RuntimeError("this page copier is closed")
            self._running += 1
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()


class CopyGeometry:
    """The addresses and strides of every run of a block, in the engine and in the slab.

    A block exists if all `runs` have it. `shard_offsets` are the offsets of the runs in the shard,
    in bytes; by default the runs follow each other. Slot s begins at
    `slab_address + s * slot_nbytes`, and the shard `offset` bytes after that. The engine's memory
    and the slab must not overlap. `transposes` has a `Transpose` for a gather of each run; it is
    empty if runs are copied as they are.

    Attributes:
        blocks: how many blocks all runs have.
        nbytes: bytes of each run.
        layers: the number of the layer of each run.
        engine: the addresses of the runs of block 0, and the strides to the next block.
        slab: the addresses of the runs in slot 0, and the strides to the next slot.
    """

    def __init__(
        self,
        runs: Sequence[BlockRun],
        shard_offsets: Sequence[int] | None = None,
        /,
        *,
        slab_address: int,
        slots: int,
        slot_nbytes: int,
        offset: int = 0,
        transposes: Sequence[Sequence[int]] = (),
    ) -> None:
        if not runs:
            raise ValueError("there are no pages to copy")
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        if shard_offsets is None:
            shard_offsets = [*accumulate((run.nbytes for run in runs[:-1]), initial=0)]
        ends = [begin + run.nbytes for begin, run in zip(shard_offsets, runs, strict=True)]
        check_shard(offset, max(ends), slot_nbytes)
        self.slab_address, self.slots, self.slot_nbytes = slab_address, slots, slot_nbytes
        self.blocks = min(run.count for run in runs)
        self.nbytes = integers([run.nbytes for run in runs])
        self.transposes = transposes
        self.layers = integers([run.layer for run in runs])
        self.engine = (
            integers([run.address for run in runs]),
            integers([run.stride for run in runs]),
        )
        self.slab = (
            integers([slab_address + offset + begin for begin in shard_offsets]),
            integers([slot_nbytes] * len(runs)),
        )


def _check_numbers(noun: str, numbers: Integers, count: int) -> None:
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
        _raise_missing(noun, next(n for n in numbers.tolist() if not 0 <= n < count), count)


def _raise_missing(noun: str, number: int, count: int) -> NoReturn:
    raise IndexError(f"{noun} {number} does not exist: there are {count}, from 0")


def check_shard(offset: int, nbytes: int, slot_nbytes: int) -> None:
    """Raise ValueError if the shard does not lie inside a slot."""
    if offset < 0 or offset + nbytes > slot_nbytes:
        raise ValueError(
            f"a shard of {nbytes} bytes at offset {offset}"
            f" does not lie inside a slot of {slot_nbytes} bytes"
        )


def integers(values: Sequence[int]) -> Integers:
    """Convert `values` to an array of 64-bit integers."""
    return np.array(values, dtype=np.int64)
