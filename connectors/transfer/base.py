"""The seam between who knows what to copy and who copies it: blocks of an engine, slots of a slab.

A block lies in an engine's cache in one run of bytes per layer, or several (`BlockRun`). A
slot holds one block of every rank: this rank's shard begins at `offset` in the slot and is those
runs, one after another.

Always true of every copier:
- Only whole pages move, and nothing outside them is read or written.
- A call refused for its arguments has moved nothing; of a call that raises nothing is under way.
- After `close` returns no copy is running and none can begin, so the memory may be unmapped.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache.connectors.layout.placement import BlockRun
from kvcache.process import bind_to_process

Integers = NDArray[np.int64]


class Copy(Protocol):
    """A copy that was begun."""

    @property
    def done(self) -> bool:
        """Whether every byte is where it belongs; asking waits for nobody."""

    @property
    def seconds(self) -> float:
        """What it took, once it is over."""

    def wait(self) -> None:
        """Wait until it is over."""


@dataclass(frozen=True, slots=True)
class CompletedCopy:
    """A copy that was over when the call returned."""

    seconds: float
    done: bool = True

    def wait(self) -> None:
        return


class PageCopier(ABC):
    """Moves blocks between one rank's pages and its shards of the slots; safe to call from threads.

    Both copies take two sequences of equal length: the i-th block goes with the i-th slot.
    They raise ValueError when the lengths differ or two copies have the same target, IndexError
    for a block or slot that does not exist, RuntimeError after `close`. A mechanism has two methods
    to fill in; what it is given there has been checked.

    Pages are the engine's in the order of its own work: a copy sees what the engine had begun to
    write before the call, and what it begins after the call sees what the copy wrote. Slots are
    the caller's, who leaves them alone until the copy is over.
    """

    def __init__(self, *, blocks: int, slots: int) -> None:
        self._counts = {"block": blocks, "slot": slots}
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()
        bind_to_process(self)

    def gather(self, blocks: Sequence[int], slots: Sequence[int]) -> Copy:
        """Copy the engine's pages of `blocks` into `slots`."""
        with self._in_flight():
            return self._gather(*self._checked(block=blocks, slot=slots))

    def scatter(
        self,
        slots: Sequence[int],
        blocks: Sequence[int],
        *,
        awaited: bool = True,
        announced: Collection[int] = (),
    ) -> Copy:
        """Copy the shards in `slots` to the engine's pages of `blocks`.

        Pages of a layer that the engine has `announced` are seen by what it begins after it is said
        to `wait_for_layer` it, and until then it touches none of them.

        Not `awaited`: what the engine begins after the call need not see them, and touches none of
        them until the copy is over.
        """
        with self._in_flight():
            read, written = self._checked(slot=slots, block=blocks)
            return self._scatter(read, written, awaited, announced)

    def wait_for_layer(self, layer: int | None = None) -> None:
        """The engine comes to `layer`, or to all: it goes on when its awaited pages are there.

        Any thread of the engine's may say so, and each must that computes on a stream of its own.
        """
        return  # they are where copies are over when calls return

    def fence(self, blocks: Collection[int]) -> None:
        """The engine will write `blocks` from now on: it does when nobody reads them any more."""
        return  # nobody does where copies are over when calls return

    def pin_slots(self, slots: int) -> None:
        """The memory of the first `slots` slots is there: it may be made ready for copies."""
        return

    def close(self) -> None:
        """Wait for running copies and refuse new ones. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._running)

    @abstractmethod
    def _gather(self, blocks: Integers, slots: Integers) -> Copy: ...

    @abstractmethod
    def _scatter(
        self, slots: Integers, blocks: Integers, awaited: bool, announced: Collection[int]
    ) -> Copy: ...

    def _checked(self, **given: Sequence[int]) -> tuple[Integers, Integers]:
        """Sources and targets as arrays, every one of them looked at."""
        (source, sources), (target, targets) = given.items()
        if len(sources) != len(targets):
            raise ValueError(
                f"{len(sources)} {source}s do not pair up with {len(targets)} {target}s"
            )
        rows = integers(sources), integers(targets)
        for noun, ids in zip(given, rows, strict=True):
            count = self._counts[noun]
            if len(ids) and (ids.min() < 0 or ids.max() >= count):
                wrong = next(row for row in ids.tolist() if not 0 <= row < count)
                raise IndexError(f"{noun} {wrong} does not exist: there are {count}, from 0")
        if len(set(targets)) < len(targets):
            raise ValueError(f"a {target} is the target of two copies: {list(targets)}")
        return rows

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise RuntimeError("this page copier is closed")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


class CopyGeometry:
    """Where every run of a block begins on both sides of a rank's copies, and how far apart.

    `pages` are this rank's; blocks exist that all of them have. In its shard they begin where
    `begins` says, in bytes, or lie one after another. Slot s begins at
    `slab_address + s * slot_nbytes`, the shard `offset` bytes further. Engine and slab must not
    overlap.

    Attributes:
        blocks: of the engine.
        nbytes: of each run.
        layers: that each run is of.
        engine: addresses of the runs of block 0, and strides to those of the next.
        slab: the same of slots.
    """

    def __init__(
        self,
        pages: Sequence[BlockRun],
        begins: Sequence[int] | None = None,
        /,
        *,
        slab_address: int,
        slots: int,
        slot_nbytes: int,
        offset: int = 0,
    ) -> None:
        if not pages:
            raise ValueError("there are no pages to copy")
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        if begins is None:
            begins = [*accumulate((page.nbytes for page in pages[:-1]), initial=0)]
        ends = [begin + page.nbytes for begin, page in zip(begins, pages, strict=True)]
        check_shard(offset, max(ends), slot_nbytes)
        self.slab_address, self.slots, self.slot_nbytes = slab_address, slots, slot_nbytes
        self.blocks = min(page.count for page in pages)
        self.nbytes = integers([page.nbytes for page in pages])
        self.layers = integers([page.layer for page in pages])
        self.engine = (
            integers([page.address for page in pages]),
            integers([page.stride for page in pages]),
        )
        self.slab = (
            integers([slab_address + offset + begin for begin in begins]),
            integers([slot_nbytes] * len(pages)),
        )


def check_shard(offset: int, nbytes: int, slot_nbytes: int) -> None:
    """Raise ValueError for a shard that does not lie inside a slot."""
    if offset < 0 or offset + nbytes > slot_nbytes:
        raise ValueError(
            f"a shard of {nbytes} bytes at offset {offset}"
            f" does not lie inside a slot of {slot_nbytes} bytes"
        )


def integers(values: Sequence[int]) -> Integers:
    """`values` as addresses and numbers of rows are kept."""
    return np.array(values, dtype=np.int64)
