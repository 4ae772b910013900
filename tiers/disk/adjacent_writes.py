"""Groups the blocks of a store: one write for small blocks in adjacent slots.

Each write costs the engine's process CPU time whatever its size: system calls for the block and its
record, and the switch to another thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvcache.tiers.disk.bounce_buffers import is_aligned
from kvcache.tiers.disk.record_file import Record

_MAX_NBYTES = 2 << 20  # of a write of several blocks


class AdjacentBlocks(NamedTuple):
    """Blocks in adjacent slots, by slot. Several blocks are whole aligned slots each."""

    records: list[Record]
    blocks: list[memoryview]

    @property
    def first_slot(self) -> int:
        """The slot of the first block."""
        return self.records[0].slot


def group_adjacent(
    records: Sequence[Record], blocks: Sequence[memoryview], slot_nbytes: int
) -> list[AdjacentBlocks]:
    """Group the blocks of a store.

    Args:
        records: the record of each block.
        blocks: the bytes of each block.
        slot_nbytes: bytes of a slot.
    """
    groups: list[AdjacentBlocks] = []
    end = 0  # how many blocks the last group may have
    for record, block in sorted(zip(records, blocks, strict=True), key=lambda pair: pair[0].slot):
        groupable = len(block) == slot_nbytes and block.contiguous and is_aligned(block)
        last = groups[-1] if groups else None
        if (
            last is not None
            and groupable
            and len(last.records) < end
            and record.slot == last.records[-1].slot + 1
        ):
            last.records.append(record)
            last.blocks.append(block)
        else:
            groups.append(AdjacentBlocks([record], [block]))
            end = _MAX_NBYTES // slot_nbytes if groupable else 1
    return groups
