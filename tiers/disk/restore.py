"""Restores the index of a tier from its records when the tier is opened."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kvcache.index import Index
from kvcache.keys import branches_of
from kvcache.tiers.disk.record_file import Geometry
from kvcache.tiers.disk.record_scan import RecordColumns, read_columns


class Restored(NamedTuple):
    """What the records of a tier contained, besides the index.

    Attributes:
        newest: the highest generation; 0 without records.
        nbytes: bytes of the block in each slot; 0 where there is none.
        repeated: slots of blocks that a newer record has as well; they are free.
    """

    newest: int
    nbytes: array[int]
    repeated: list[int]


def restore_index(index: Index, fd: int, geometry: Geometry) -> Restored:
    """Open the slots of a new index, with the blocks that the file ``records`` has in them.

    Args:
        index: an index without slots.
        fd: the file.
        geometry: the geometry of the tier.
    """
    with _collector_paused():
        return _restore_records(index, fd, geometry)  # frees the columns before the pause ends


def _restore_records(index: Index, fd: int, geometry: Geometry) -> Restored:
    records = read_columns(fd, geometry)
    order = records.by_age()
    repeated: list[int] = []
    if not _restore(index, records, order, geometry.slots):
        # An older record could not be cleared, and its block was stored again.
        newest = {records.keys[at]: at for at in order}
        kept = set(newest.values())
        repeated = [records.slots[at] for at in order if at not in kept]
        order = [at for at in order if at in kept]
        if not _restore(index, records, order, geometry.slots):
            _forget_newer_parents(records, order)
            _restore(index, records, order, geometry.slots)
    newest_generation = max(records.generations, default=0)
    return Restored(newest_generation, records.nbytes_by_slot(geometry.slots), repeated)


def _restore(index: Index, records: RecordColumns, order: Sequence[int], slots: int) -> bool:
    """Restore the records at these positions.

    Returns:
        whether it was done: not if a key is there twice, or if a chain continues itself.
    """
    keys = tuple([records.keys[at] for at in order])
    parents = [records.parents[at] for at in order]
    return index.restore(branches_of(keys, parents), [records.slots[at] for at in order], slots)


def _forget_newer_parents(records: RecordColumns, order: Sequence[int]) -> None:
    """Forget every parent that is not older than its block, so that no chain continues itself.

    Keys are hashes of their parents: only a damaged file has such a chain.
    """
    not_older = {records.keys[at] for at in order}
    for at in order:
        if records.parents[at] in not_older:
            records.parents[at] = None
        not_older.discard(records.keys[at])


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector. All new objects of a restore stay, and the collector would
    scan them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
