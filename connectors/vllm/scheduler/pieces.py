"""Where each rank's bytes of a block lie in the slots.

A kept group's block is cut into parts of equal size, and each part has a slot. In the slot, the
shards of the ranks follow each other. A rank's shard of a block is the pages of the group's
members, one member after another, and a part has an equal share of it.

Invariants:

1. Every byte of a block that some rank has is in exactly one part, once: of ranks that have the
   same bytes, the first one stores them, and all of them load them.
2. With one group, a slot is the shards of all ranks without a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.connectors.vllm.messages import Piece, PieceOfRank, Rank, Shard
from kvcache.parts import choose_parts

CUT_ALIGNMENT: Final = 64
"""Bytes. A shard is cut at multiples of this, so that copies of parts are of whole cache lines."""


@dataclass(frozen=True, slots=True)
class BlockCut:
    """How the blocks of all kept groups are cut.

    Attributes:
        parts: of a block of each kept group.
        group_nbytes: bytes of a block of each kept group, in all parts; bytes that several ranks
            have count once.
        slot_nbytes: bytes of the largest part.
        pieces: in the order of kept groups, then of parts, then of members.
    """

    parts: tuple[int, ...]
    group_nbytes: tuple[int, ...]
    slot_nbytes: int
    pieces: tuple[Piece, ...]


def cut_blocks(shards: Mapping[Rank, Shard], groups: Sequence[KeptGroup]) -> BlockCut:
    """Choose the parts of the blocks of `groups`, and place the shards of all ranks in them."""
    owned = [_owned_nbytes(shards, group) for group in groups]
    group_nbytes = tuple(
        sum(sum(by_member.values()) for by_member in by_rank.values()) for by_rank in owned
    )
    parts = choose_parts(group_nbytes)
    pieces, slot_nbytes = list[Piece](), 0
    for group, by_rank, count in zip(groups, owned, parts, strict=True):
        placed, end = _place_group(shards, group, by_rank, count)
        pieces += placed
        slot_nbytes = max(slot_nbytes, end)
    return BlockCut(parts, group_nbytes, slot_nbytes, tuple(pieces))


def owner(shards: Mapping[Rank, Shard], rank: Rank, member: int) -> Rank:
    """Return the rank that stores the bytes that `rank` has of a block of vLLM's group `member`."""
    shard = shards[rank]
    replicas = shard.replicas[member] if shard.replicas else 1
    first = (rank[0], rank[1] // replicas * replicas)
    other = shards.get(first)
    same = (
        other is not None
        and other.replicas == shard.replicas
        and other.nbytes[member] == shard.nbytes[member]
        and other.format_id == shard.format_id
    )
    return first if same else rank


def _owned_nbytes(shards: Mapping[Rank, Shard], group: KeptGroup) -> dict[Rank, dict[int, int]]:
    """Return the bytes that each rank stores of a block of each member."""
    return {
        rank: {
            member: shard.nbytes[member]
            for member in group.members
            if shard.nbytes[member] and owner(shards, rank, member) == rank
        }
        for rank, shard in sorted(shards.items())
    }


def _place_group(
    shards: Mapping[Rank, Shard],
    group: KeptGroup,
    owned: Mapping[Rank, Mapping[int, int]],
    parts: int,
) -> tuple[list[Piece], int]:
    """Return the pieces of a kept group, and the bytes of its largest part."""
    where: dict[tuple[int, int], dict[Rank, PieceOfRank]] = {  # by part and member
        (part, member): {} for part in range(parts) for member in group.members
    }
    offset = 0
    for rank, by_member in owned.items():
        nbytes = sum(by_member.values())
        align = CUT_ALIGNMENT if parts > 1 and nbytes >= parts * CUT_ALIGNMENT else 1
        cuts = [*(nbytes * part // parts // align * align for part in range(parts)), nbytes]
        at = 0
        for member, member_nbytes in by_member.items():
            for part, (begin, end) in enumerate(pairwise(cuts)):
                first, last = max(begin, at), min(end, at + member_nbytes)
                if first < last:
                    piece = PieceOfRank(first - at, last - at, offset + first - begin)
                    where[part, member][rank] = piece
            at += member_nbytes
        largest = max(end - begin for begin, end in pairwise(cuts))
        offset += -(-largest // align) * align
    pieces = []
    for (part, member), stored in where.items():
        ranks = dict(stored)
        for rank, shard in shards.items():
            first_rank = owner(shards, rank, member)
            if first_rank != rank and first_rank in stored and shard.nbytes[member]:
                of_owner = stored[first_rank]
                ranks[rank] = PieceOfRank(of_owner.begin, of_owner.end, of_owner.offset, False)
        if ranks:
            pieces.append(Piece(group.index, member, part, ranks))
    return pieces, offset
