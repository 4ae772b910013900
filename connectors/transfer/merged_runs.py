"""Runs of a block that lie next to each other in the engine and in a slot, copied as one run.

Invariants:

* Merged runs have the same bytes as the runs that they replace, for every block and slot.
* Runs of layers that are not selected are not in them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from kvcache.connectors.transfer.base import CopyGeometry, Integers


class MergedRuns:
    """The runs of some layers of a geometry, merged where they are adjacent.

    Two runs are merged if the second begins where the first one ends, in the engine and in the
    slot, and if both have the same stride between blocks.

    Args:
        geometry: that has the runs.
        layers: numbers of the selected layers; ``None`` selects all.

    Attributes:
        nbytes: bytes of each merged run.
        engine: the addresses of the merged runs of block 0, and the strides to the next block.
        slab: the addresses of the merged runs in slot 0, and the strides to the next slot.
    """

    def __init__(self, geometry: CopyGeometry, layers: Collection[int] | None = None) -> None:
        (engine, engine_strides), (slab, slab_strides) = geometry.engine, geometry.slab
        nbytes = geometry.nbytes
        if layers is not None:
            selected = np.isin(geometry.layers, list(layers))
            engine, engine_strides = engine[selected], engine_strides[selected]
            slab, slab_strides = slab[selected], slab_strides[selected]
            nbytes = nbytes[selected]
        first = np.ones(len(nbytes), dtype=bool)  # whether a run begins a merged one
        first[1:] = (
            (engine[1:] != engine[:-1] + nbytes[:-1])
            | (slab[1:] != slab[:-1] + nbytes[:-1])
            | (engine_strides[1:] != engine_strides[:-1])
            | (slab_strides[1:] != slab_strides[:-1])
        )
        begins = np.flatnonzero(first)
        self.nbytes: Integers = np.add.reduceat(nbytes, begins) if len(begins) else nbytes
        self.engine = engine[first], engine_strides[first]
        self.slab = slab[first], slab_strides[first]
        self._engine_strides, self._slab_strides = map(
            _one_if_equal, (self.engine[1], self.slab[1])
        )

    def __len__(self) -> int:
        return len(self.nbytes)

    def write_rows(
        self,
        blocks: Integers,
        slots: Integers,
        engine: Integers,
        slab: Integers,
        nbytes: Integers,
    ) -> None:
        """Write the addresses and sizes of the runs of all blocks.

        Args:
            blocks: numbers of blocks.
            slots: as many numbers of slots.
            engine: receives the addresses in the engine, block by block: one for each block and
                run.
            slab: receives as many addresses in the slab.
            nbytes: receives as many byte counts.
        """
        shape = len(blocks), len(self)
        np.add(blocks[:, None] * self._engine_strides, self.engine[0], out=engine.reshape(shape))
        np.add(slots[:, None] * self._slab_strides, self.slab[0], out=slab.reshape(shape))
        nbytes.reshape(shape)[:] = self.nbytes


def _one_if_equal(strides: Integers) -> Integers:
    """Return the first stride alone if all are equal, so that fewer numbers are multiplied."""
    return strides[:1] if len(strides) and (strides == strides[0]).all() else strides
