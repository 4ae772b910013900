"""The pieces of blocks that one rank copies, and the rows of its page copier for a transfer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from kvcache.connectors.transfer.base import CopyGeometry
from kvcache.connectors.vllm.messages import PieceOfRank, Rank, SlabShards, Transfer
from kvcache.connectors.vllm.worker.pages import RankPages
from kvcache.slab import Slab

Operation = Literal["load", "store"]


@dataclass(slots=True)
class TransferRows:
    """What a page copier copies for transfers: blocks, as many slots, and the geometry of each.

    Attributes:
        geometries: the number of a geometry, and how many of the next blocks have it; each once.
        nbytes: that are copied for each transfer.
    """

    blocks: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    geometries: list[tuple[int, int]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)


class RankPieces:
    """The pieces that one rank has, each with a geometry of its own.

    Raises:
        ValueError: if the pieces are not exactly the bytes of this rank's blocks.
    """

    def __init__(self, memory: SlabShards, rank: Rank, pages: RankPages) -> None:
        self._pages = pages
        self._pieces = [piece.ranks.get(rank) for piece in memory.pieces]
        self._members = [piece.member for piece in memory.pieces]
        self._geometries = list[int]()  # by number of the piece
        count = 0
        for piece in self._pieces:
            self._geometries.append(count)
            count += piece is not None
        for member, nbytes in enumerate(pages.nbytes):
            ranges = sorted((where.begin, where.end) for where in self._of_member(member))
            ends = [0, *(end for _, end in ranges)]
            if [begin for begin, _ in ranges] != ends[:-1] or ends[-1] != nbytes:
                raise ValueError(
                    f"the pieces of rank {rank} are not the {nbytes} bytes of a block of vLLM's"
                    f" group {member}"
                )

    def geometries(self, slab: Slab) -> list[CopyGeometry]:
        """Return the geometry of each piece that this rank has."""
        return [
            CopyGeometry(
                self._pages.runs(member, piece.begin, piece.end),
                slab_address=slab.address,
                slots=slab.slots,
                slot_nbytes=slab.slot_nbytes,
                offset=piece.offset,
            )
            for piece, member in zip(self._pieces, self._members, strict=True)
            if piece is not None
        ]

    def rows(self, transfers: Iterable[Transfer], operation: Operation) -> TransferRows:
        """Return what this rank copies for `transfers`.

        Raises:
            IndexError: for a piece that does not exist.
            ValueError: if a transfer does not name the pieces of all its blocks.
        """
        rows = TransferRows()
        by_geometry = dict[int, tuple[list[int], list[int]]]()  # blocks and slots
        for transfer in transfers:
            at = nbytes = 0
            for number, count in transfer.pieces:
                begin, at = at, at + count
                if piece_nbytes := self._copied_nbytes(number, operation):
                    blocks, slots = by_geometry.setdefault(self._geometries[number], ([], []))
                    blocks += transfer.blocks[begin:at]
                    slots += transfer.slots[begin:at]
                    nbytes += count * piece_nbytes
            if at != len(transfer.blocks):
                raise ValueError(f"the pieces of {at} of {len(transfer.blocks)} blocks are named")
            rows.nbytes.append(nbytes)
        for geometry, (blocks, slots) in by_geometry.items():
            rows.blocks += blocks
            rows.slots += slots
            rows.geometries.append((geometry, len(blocks)))
        return rows

    def _copied_nbytes(self, number: int, operation: Operation) -> int:
        """Return the bytes that this rank copies for each block with a piece."""
        if not 0 <= number < len(self._pieces):
            raise IndexError(
                f"piece {number} does not exist: there are {len(self._pieces)}, from 0"
            )
        piece = self._pieces[number]
        if piece is None or (operation == "store" and not piece.stores):
            return 0
        return piece.end - piece.begin

    def _of_member(self, member: int) -> Iterator[PieceOfRank]:
        """Yield this rank's pieces of vLLM's group ``member``."""
        for piece, of in zip(self._pieces, self._members, strict=True):
            if of == member and piece is not None:
                yield piece
