"""Which blocks of a request are offered to the stack when a step computes them.

Invariants:

1. A block is offered in the step that completes it, or later while vLLM still keeps it: a block
   before the current window or chunk may belong to another request already.
2. A state is offered only in the step in which vLLM hands it off, and only if the request still has
   its block: with async scheduling, vLLM may have assigned the block to another request already.
3. Only blocks that a later request can need are offered (`KeptGroup.is_reachable`).
4. A block without an id in one of the member groups is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcache.connectors.jobs import AdmittedRequest, BlockCopies
from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.connectors.vllm.scheduler.copies import NO_BLOCK, BlockIds, PieceCopies
from kvcache.connectors.vllm.scheduler.request_keys import RequestKeys
from kvcache.keys import Branch
from kvcache.tier import Lease

if TYPE_CHECKING:
    from vllm.v1.request import Request

HandOff = tuple[int, int, int]
"""A state that vLLM hands off: number of vLLM's group, block id, tokens up to the state."""


@dataclass(frozen=True, slots=True)
class OfferedBlocks:
    """Blocks of one kept group of a request.

    Attributes:
        blocks: their positions in the request.
        keys: of all their parts.
        ids: vLLM's ids of the blocks.
    """

    group: KeptGroup
    blocks: Sequence[int]
    keys: list[bytes]
    ids: BlockIds


class Offers:
    """Finds the blocks to offer, and the copies that store them.

    Args:
        keys: derives the keys of requests, for each kept group.
        copies: makes the copies of a job.
    """

    def __init__(self, keys: RequestKeys, copies: PieceCopies) -> None:
        self._keys = keys
        self._copies = copies
        self._of_member = {
            member: group for group in keys.groups for member in group.members if group.is_state
        }

    def find(
        self,
        admitted: AdmittedRequest[Request],
        computed: int,
        end: int,
        hand_offs: Sequence[HandOff] = (),
    ) -> list[OfferedBlocks]:
        """Return the blocks to offer now, by group, and note that they were offered.

        Args:
            admitted: the request.
            computed: its tokens before this step.
            end: its tokens after this step, drafted ones included.
            hand_offs: the states of the request that vLLM hands off in this step. The request's
                tables must then be vLLM's own.
        """
        request = admitted.request
        hashes = len(request.block_hashes)
        found = []
        for group in self._keys.groups:
            # Drafted tokens may be rejected. Only blocks of known tokens have a hash.
            complete = group.complete_blocks(end, hashes)
            if complete <= admitted.offered[group.index] or group.is_state:
                continue  # most decode steps
            offered = admitted.unoffered(complete, group.block_tokens, group.index)
            admitted.offered[group.index] = offered.stop
            if blocks := self._kept(admitted, group, offered, computed):
                tables = {member: admitted.tables[member] for member in group.members}
                ids: BlockIds
                if isinstance(blocks, range):
                    ids = {member: of[blocks.start : blocks.stop] for member, of in tables.items()}
                else:
                    ids = {member: [of[at] for at in blocks] for member, of in tables.items()}
                found.append(self._offered(request, group, blocks, ids))
        if hand_offs:
            found += self._states(admitted, hand_offs)
        return found

    def _kept(
        self, admitted: AdmittedRequest[Request], group: KeptGroup, offered: range, computed: int
    ) -> Sequence[int]:
        """Return those of the ``offered`` blocks that vLLM keeps and a later request can need."""
        if group.is_chain or not offered:
            return offered
        first = max(offered.start, group.needs.first_token(computed) // group.block_tokens)
        tables = [admitted.tables[member] for member in group.members]
        return [
            block
            for block in range(first, min(offered.stop, *map(len, tables)))
            if group.is_reachable(block) and all(table[block] != NO_BLOCK for table in tables)
        ]

    def _states(
        self, admitted: AdmittedRequest[Request], hand_offs: Sequence[HandOff]
    ) -> list[OfferedBlocks]:
        """Return the states to offer: handed off now, at a block's end, and not offered yet."""
        request = admitted.request
        by_block: dict[tuple[int, int], dict[int, list[int]]] = {}
        for member, block_id, tokens in hand_offs:
            group = self._of_member.get(member)
            if group is None or tokens % group.block_tokens or block_id == NO_BLOCK:
                continue  # vLLM hands off states within blocks, too
            block = tokens // group.block_tokens - 1
            if admitted.tables[member][block : block + 1] != [block_id]:
                continue
            if block in admitted.unoffered(
                group.complete_blocks(request.num_tokens, len(request.block_hashes)),
                group.block_tokens,
                group.index,
            ):
                by_block.setdefault((group.index, block), {})[member] = [block_id]
        return [
            self._offered(request, self._keys.groups[index], [block], ids)
            for (index, block), ids in by_block.items()
            if len(ids) == len(self._keys.groups[index].members)
        ]

    def _offered(
        self, request: Request, group: KeptGroup, blocks: Sequence[int], ids: BlockIds
    ) -> OfferedBlocks:
        first, end = blocks[0], blocks[-1] + 1
        keys = self._keys.parts_of(request, group, first, end)
        if len(blocks) < end - first:
            parts = self._keys.parts[group.index]
            keys = [
                key
                for block in blocks
                for key in keys[(block - first) * parts : (block - first + 1) * parts]
            ]
        return OfferedBlocks(group, blocks, keys, ids)

    def branches(
        self, request: Request, offered: Sequence[OfferedBlocks]
    ) -> tuple[list[Branch], list[Branch]]:
        """Return the segments to reserve: those of chains, and those of side blocks."""
        chains: list[Branch] = []
        sides: list[Branch] = []
        for each in offered:
            if each.group.is_chain:
                [parent] = self._keys.parents(request, each.group, each.blocks[:1])
                chains.append((each.keys, parent))
                continue
            parts = self._keys.parts[each.group.index]
            parents = self._keys.parents(request, each.group, each.blocks)
            for at, parent in enumerate(parents):
                sides.append((each.keys[at * parts : (at + 1) * parts], parent))
        return chains, sides

    def copies(self, offered: Sequence[OfferedBlocks], lease: Lease) -> BlockCopies:
        """Return the copies into the slots that ``lease`` has of the ``offered`` blocks."""
        copied, base, slots = [], 0, lease.slots
        complete = len(slots) == sum(len(each.keys) for each in offered)
        slot_at = {} if complete else dict(zip(lease.positions, slots, strict=True))
        for each in offered:
            parts, count = self._keys.parts[each.group.index], len(each.keys)
            for part in range(parts):
                positions = range(base + part, base + count, parts)
                if complete:
                    copied.append(
                        (each.group, part, each.ids, slots[positions.start : base + count : parts])
                    )
                    continue
                kept = [at for at, position in enumerate(positions) if position in slot_at]
                ids = {member: [of[at] for at in kept] for member, of in each.ids.items()}
                copied.append((each.group, part, ids, [slot_at[positions[at]] for at in kept]))
            base += count
        return self._copies.of(copied)
