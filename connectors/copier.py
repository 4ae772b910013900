"""The seam between who knows what to copy and who copies it: pages of an engine, slots of a slab.

An engine keeps one region of memory per layer, cut into pages; block b is page b of every layer.
A slot holds one block of every rank: this rank's shard begins at `offset` in the slot and is the
pages of its layers, one after another.

Always true of every copier:
- Only whole pages move, and nothing outside them is read or written.
- A call that raises has moved nothing of which more is to come: nothing is under way.
- After `close` returns no copy is running and none can begin, so the memory may be unmapped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's pages: page b is the `nbytes` bytes at `address + b * stride`, 0 <= b < `count`.

    `stride` is in bytes; it exceeds `nbytes` where the engine interleaves layers.
    """

    address: int
    nbytes: int
    stride: int
    count: int

    def __post_init__(self) -> None:
        if self.nbytes < 1 or self.count < 1 or self.stride < self.nbytes:
            raise ValueError(f"{self}: nbytes and count must be at least 1, stride at least nbytes")


class Copy(Protocol):
    """A copy that was begun."""

    @property
    def over(self) -> bool:
        """Whether every byte is where it belongs; asking waits for nobody."""

    @property
    def seconds(self) -> float:
        """What it took, once it is over."""


@dataclass(frozen=True, slots=True)
class Made:
    """A copy that was over when the call returned."""

    seconds: float
    over: bool = True


class PageCopier(ABC):
    """Moves blocks between one rank's pages and its shards of the slots.

    Both copies take two sequences of equal length: the i-th block goes with the i-th slot.
    They raise ValueError when the lengths differ or two copies have the same target, IndexError
    for a block or slot that does not exist, RuntimeError after `close`.

    Pages are the engine's in the order of its own work: a copy sees what the engine had begun to
    write before the call, and what it begins after the call sees what the copy wrote. Slots are
    the caller's, who leaves them alone until the copy is over.
    """

    @abstractmethod
    def gather(self, blocks: Sequence[int], slots: Sequence[int]) -> Copy:
        """Copy the engine's pages of `blocks` into `slots`."""

    @abstractmethod
    def scatter(self, slots: Sequence[int], blocks: Sequence[int], *, awaited: bool = True) -> Copy:
        """Copy the shards in `slots` to the engine's pages of `blocks`.

        Not `awaited`: what the engine begins after the call need not see them, and touches none of
        them until the copy is over.
        """

    @abstractmethod
    def fence(self, blocks: Collection[int]) -> None:
        """The engine will write `blocks` from now on: it does when nobody reads them any more."""

    @abstractmethod
    def close(self) -> None:
        """Wait for running copies and refuse new ones. May be called again."""


@dataclass(frozen=True, slots=True)
class Side:
    """Where each layer's pages lie on one side of a copy, and how many rows of them there are."""

    noun: str
    count: int
    addresses: Integers
    strides: Integers

    def rows(self, ids: Sequence[int]) -> Integers:
        """`ids` as an array, every one of them checked."""
        rows = integers(ids)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.count):
            wrong = next(row for row in ids if not 0 <= row < self.count)
            raise IndexError(f"{self.noun} {wrong} does not exist: there are {self.count}, from 0")
        return rows


class Sides:
    """Both sides of a rank's copies.

    `layers` are this rank's pages, in the order of its shard; blocks exist that every layer has.
    Slot s begins at `slab_address + s * slot_nbytes`, the shard `offset` bytes further. Engine and
    slab must not overlap.
    """

    def __init__(
        self,
        layers: Sequence[Pages],
        *,
        slab_address: int,
        slots: int,
        slot_nbytes: int,
        offset: int = 0,
    ) -> None:
        if not layers:
            raise ValueError("layers is empty: there are no pages to copy")
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        *begins, end = accumulate((layer.nbytes for layer in layers), initial=offset)
        if offset < 0 or end > slot_nbytes:
            raise ValueError(
                f"a shard of {end - offset} bytes at offset {offset}"
                f" does not lie inside a slot of {slot_nbytes} bytes"
            )
        self.nbytes = integers([layer.nbytes for layer in layers])  # per layer
        self.blocks = Side(
            "block",
            min(layer.count for layer in layers),
            integers([layer.address for layer in layers]),
            integers([layer.stride for layer in layers]),
        )
        self.slots = Side(
            "slot",
            slots,
            integers([slab_address + begin for begin in begins]),
            integers([slot_nbytes] * len(layers)),
        )


def paired(
    source: Side, sources: Sequence[int], target: Side, targets: Sequence[int]
) -> tuple[Integers, Integers]:
    """The rows to read and those to write, checked as `PageCopier` says."""
    if len(sources) != len(targets):
        raise ValueError(
            f"{len(sources)} {source.noun}s do not pair up with {len(targets)} {target.noun}s"
        )
    read, written = source.rows(sources), target.rows(targets)
    if len(set(targets)) < len(targets):
        raise ValueError(f"a {target.noun} is the target of two copies: {list(targets)}")
    return read, written


def integers(values: Sequence[int]) -> Integers:
    """`values` as addresses and numbers of rows are kept."""
    return np.array(values, dtype=np.int64)
