"""Which bytes of a block each rank has in which part, and at which offset of a slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st

from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.connectors.vllm.messages import PieceOfRank, Rank, Shard
from kvcache.connectors.vllm.scheduler.pieces import CUT_ALIGNMENT, cut_blocks
from kvcache.resume import Needs

pytestmark = pytest.mark.engine

MIB = 1 << 20


def kept(*members: Sequence[int]) -> list[KeptGroup]:
    """Return kept groups that merge these of vLLM's groups."""
    return [
        KeptGroup(index, tuple(each), Needs("all"), 32, 1) for index, each in enumerate(members)
    ]


def shards(
    by_rank: Mapping[Rank, Sequence[int]], replicas: Sequence[int] = ()
) -> dict[Rank, Shard]:
    """Return shards of so many bytes of each of vLLM's groups."""
    return {
        rank: Shard(tuple(nbytes), "host", "form", replicas=tuple(replicas))
        for rank, nbytes in by_rank.items()
    }


def test_cut_blocks_of_one_group_lays_the_shards_side_by_side() -> None:
    cut = cut_blocks(shards({(0, 0): [1000], (0, 1): [1000], (1, 0): [500]}), kept([0]))
    assert (cut.parts, cut.group_nbytes, cut.slot_nbytes) == ((1,), (2500,), 2500)
    [piece] = cut.pieces
    assert piece.ranks == {
        (0, 0): PieceOfRank(0, 1000, 0),
        (0, 1): PieceOfRank(0, 1000, 1000),
        (1, 0): PieceOfRank(0, 500, 2000),
    }


def test_cut_blocks_of_a_window_of_five_times_the_layers_has_five_parts() -> None:
    """Gemma-3-27b: 10 full layers, and 52 window layers in 6 of vLLM's groups."""
    layers = [10, 9, 9, 9, 9, 8, 8]
    cut = cut_blocks(
        shards({(0, 0): [n * 64 * 1024 for n in layers]}), kept([0], [1, 2, 3, 4, 5, 6])
    )
    assert cut.parts == (1, 5)
    assert cut.group_nbytes == (10 * 65536, 52 * 65536)
    for parts, nbytes in zip(cut.parts, cut.group_nbytes, strict=True):
        assert parts * cut.slot_nbytes <= 1.05 * nbytes
    assert {(piece.group, piece.member) for piece in cut.pieces} == {
        (0, 0), *((1, member) for member in range(1, 7))
    }  # fmt: skip
    assert [(piece.group, piece.part, piece.member) for piece in cut.pieces] == sorted(
        (piece.group, piece.part, piece.member) for piece in cut.pieces
    )


@pytest.mark.parametrize(
    ("tensor_ranks", "replicas", "copies"), [(2, 2, 1), (4, 2, 2), (4, 4, 1), (4, 1, 4)]
)
def test_cut_blocks_stores_replicas_once(tensor_ranks: int, replicas: int, copies: int) -> None:
    ranks = {(0, rank): [MIB] for rank in range(tensor_ranks)}
    cut = cut_blocks(shards(ranks, [replicas]), kept([0]))
    assert cut.slot_nbytes == copies * MIB
    [piece] = cut.pieces
    for rank, where in piece.ranks.items():
        first = rank[1] // replicas
        assert where == PieceOfRank(0, MIB, first * MIB, rank[1] % replicas == 0)


def test_cut_blocks_of_replicas_with_other_bytes_stores_all() -> None:
    """A rank is a replica of another one only if both describe the same bytes."""
    ranks = shards({(0, 0): [MIB], (0, 1): [MIB]}, [2])
    ranks[0, 1] = Shard((MIB,), "host", "other form", replicas=(2,))
    cut = cut_blocks(ranks, kept([0]))
    assert cut.slot_nbytes == 2 * MIB
    assert all(where.stores for piece in cut.pieces for where in piece.ranks.values())


def test_cut_blocks_of_a_stage_without_layers_of_a_group_leaves_its_ranks_out() -> None:
    cut = cut_blocks(shards({(0, 0): [MIB, 0], (1, 0): [MIB, MIB]}), kept([0], [1]))
    by_group = {piece.group: set(piece.ranks) for piece in cut.pieces}
    assert by_group == {0: {(0, 0), (1, 0)}, 1: {(1, 0)}}


@given(st.data())
def test_cut_blocks_of_any_shards_has_every_byte_once(data: st.DataObject) -> None:
    members = data.draw(st.integers(1, 6))
    bounds = sorted(data.draw(st.sets(st.integers(1, members - 1)) if members > 1 else st.just([])))
    groups = kept(*(range(a, b) for a, b in zip([0, *bounds], [*bounds, members], strict=True)))
    stages, tensor_ranks = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    replicas = [data.draw(st.sampled_from([1, 2, 4])) for _ in range(members)]
    sizes = {
        (stage, member): data.draw(st.integers(0, 3000) | st.just(1 << 16))
        for stage, member in product(range(stages), range(members))
    }
    ranks = {
        (stage, rank): [sizes[stage, member] for member in range(members)]
        for stage, rank in product(range(stages), range(tensor_ranks))
    }
    cut = cut_blocks(shards(ranks, replicas), groups)
    in_slots: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, nbytes in ranks.items():
        for member, size in enumerate(nbytes):
            ranges = [
                (piece.ranks[rank].begin, piece.ranks[rank].end)
                for piece in cut.pieces
                if piece.member == member and rank in piece.ranks
            ]
            assert sum(end - begin for begin, end in ranges) == size
            assert all(a[1] == b[0] for a, b in pairwise(ranges))
            assert not ranges or (ranges[0][0], ranges[-1][1]) == (0, size)
    for piece in cut.pieces:
        assert 0 <= piece.part < cut.parts[piece.group]
        assert piece.member in groups[piece.group].members
        for (stage, tensor), where in piece.ranks.items():
            owner = tensor // replicas[piece.member] * replicas[piece.member]
            assert where.stores == (owner == tensor)
            of_owner = piece.ranks[stage, owner]
            assert (where.begin, where.end, where.offset) == (
                of_owner.begin, of_owner.end, of_owner.offset
            )  # fmt: skip
            if where.stores:
                end = where.offset + where.end - where.begin
                in_slots.setdefault((piece.group, piece.part), []).append((where.offset, end))
    for taken in in_slots.values():
        taken.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        assert taken[-1][1] <= cut.slot_nbytes


def test_cut_blocks_in_parts_cuts_at_whole_cache_lines() -> None:
    cut = cut_blocks(shards({(0, 0): [10_000, 99_968], (0, 1): [10_000, 99_968]}), kept([0], [1]))
    assert cut.parts[1] > 1
    for piece in cut.pieces:
        for where in piece.ranks.values():
            assert where.begin % CUT_ALIGNMENT == 0
            assert where.offset % CUT_ALIGNMENT == 0 or cut.parts[piece.group] == 1
