"""From the blocks of kept groups to the copies that workers make, piece by piece."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from kvcache.connectors.jobs import BlockCopies
from kvcache.connectors.vllm.groups import KeptGroup, may_load_within_step
from kvcache.connectors.vllm.messages import Piece
from kvcache.connectors.vllm.scheduler.pending_loads import PendingLoad
from kvcache.resume import GroupKeys

log = logging.getLogger(__name__)

NO_BLOCK: Final = 0
"""vLLM's null block: the id in a table where a request has no block."""

UNKNOWN_PIECE: Final = -1
"""A piece that no rank has, so that every rank reports a copy of it as failed."""

BlockIds = Mapping[int, Sequence[int]]
"""vLLM's block ids of some blocks of a kept group, by the number of the member group."""


class PieceCopies:
    """Makes the list of copies of a job.

    Args:
        pieces: all pieces of the engine's blocks.
        groups: the kept groups.
    """

    def __init__(self, pieces: Sequence[Piece], groups: Sequence[KeptGroup]) -> None:
        self._groups = groups
        self._may_lack_blocks = not may_load_within_step(groups)
        self._pieces: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by group and part
        for number, piece in enumerate(pieces):
            self._pieces.setdefault((piece.group, piece.part), []).append((number, piece.member))

    def of(self, copied: Sequence[tuple[KeptGroup, int, BlockIds, Sequence[int]]]) -> BlockCopies:
        """Return the copies of these parts: group, number of the part, block ids and slots."""
        blocks: list[int] = []
        all_slots: list[int] = []
        pieces: list[tuple[int, int]] = []
        for group, part, ids, slots in copied:
            for number, member in self._pieces.get((group.index, part), ()):
                if slots:
                    blocks += ids[member]
                    all_slots += slots
                    pieces.append((number, len(slots)))
        return BlockCopies(blocks, all_slots, pieces)

    def to_load(
        self,
        groups: Sequence[GroupKeys],
        tables: Sequence[Sequence[int]],
        pending: PendingLoad,
        tokens: int,
    ) -> BlockCopies:
        """Return the copies of a pending load into the blocks that vLLM reserved for it.

        If vLLM has reserved other blocks than the load needs, the copies fail and vLLM computes.

        Args:
            groups: the request's keys in the kept groups.
            tables: the request's block ids, for each of vLLM's groups.
            pending: the load.
            tokens: how many tokens of the load vLLM uses.
        """
        if not tokens:
            return BlockCopies([], [], [])
        own, end, slots = pending.own, pending.own + tokens, pending.lease.slots
        copied, at = [], 0
        for group, keys in zip(self._groups, groups, strict=True):
            pinned, needed = keys.needed(own, pending.end), keys.needed(own, end)
            begin, at = at, at + len(pinned) * keys.parts
            ids = {member: tables[member][needed.start : needed.stop] for member in group.members}
            is_pinned = not needed or (needed[0] in pinned and needed[-1] in pinned)
            if not is_pinned or any(self._lacks(of, len(needed)) for of in ids.values()):
                log.error(
                    "kvcache: connector: vLLM reserved other blocks than a hit needs (group %d, %d "
                    "to %d tokens); vLLM computes the request",
                    group.index, own, end,
                )  # fmt: skip
                return BlockCopies([NO_BLOCK], [slots[0]], [(UNKNOWN_PIECE, 1)])
            first = begin + (needed.start - pinned.start) * keys.parts
            for part in range(keys.parts if needed else 0):
                last = first + len(needed) * keys.parts
                copied.append((group, part, ids, slots[first + part : last : keys.parts]))
        return self.of(copied)

    def _lacks(self, ids: Sequence[int], count: int) -> bool:
        """Whether ``ids`` are fewer than ``count`` blocks, or one of them is vLLM's null block."""
        return len(ids) < count or (self._may_lack_blocks and NO_BLOCK in ids)
