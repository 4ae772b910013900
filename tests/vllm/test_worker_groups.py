"""The worker's side with several KV cache groups: whole bytes of each group, and failures."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.connectors.vllm.groups import kept_groups
from kvcache.connectors.vllm.messages import Acks, Rank, SlabShards, Step, Transfer
from kvcache.connectors.vllm.pieces import BlockCut, cut_blocks
from kvcache.connectors.vllm.worker import WorkerSide
from kvcache.slab import Slab, slot_nbytes_for
from tests.support.grouped_caches import (
    GroupedCaches,
    full,
    grouped_caches,
    layers,
    state,
    window,
)
from tests.support.reordering_device import ReorderingDevice

pytestmark = pytest.mark.engine

SLOTS, BLOCKS = 8, 16
MODELS = {
    "windows of five times the layers": layers(window=(52, window()), full=(10, full())),
    "a missing layer in the last group": layers(window=(5, window()), full=(3, full())),
    "states in padded pages": layers(state=(6, state()), full=(2, full())),
    "one kind": layers(full=(3, full())),
    "pages of two sizes": layers(window=(4, window(heads=4)), full=(2, full())),
}
LAYOUTS = ["LBHNC", "LBNHC", "BLHNC", "BLNHC"]


class Ranks:
    """The workers of tensor ranks, each with a KV cache of its own, and one slab."""

    def __init__(
        self,
        specs: dict[str, Any],
        ranks: int = 1,
        *,
        layout: str = "LBHNC",
        replicated: bool = False,
        device: ReorderingDevice | None = None,
    ) -> None:
        first = grouped_caches(specs, layout=layout, blocks=BLOCKS)
        self.caches = {(0, 0): first}
        for tensor_rank in range(1, ranks):
            self.caches[0, tensor_rank] = other = first.clone()
            if not replicated:
                other.memory.random_(0, 256)
        replicas = (ranks if replicated else 1,) * len(first.config.kv_cache_groups)
        self.workers = {
            rank: WorkerSide(caches.config, rank, 1, device=device, replicas=replicas)
            for rank, caches in self.caches.items()
        }
        shards = {}
        for rank, worker in self.workers.items():
            worker.register(self.caches[rank].caches)
            shard = worker.shard()
            assert shard is not None
            shards[rank] = shard
        self.config = self.caches[0, 0].config
        self.cut = cut_blocks(shards, kept_groups(self.config))
        self.slab = Slab.create(SLOTS, slot_nbytes_for(self.cut.slot_nbytes))
        self.memory = SlabShards(self.slab.descriptor, self.cut.pieces)

    def run(self, *steps: Step) -> dict[Rank, Acks]:
        """Have all ranks run steps, and return their acks when all copies have ended."""
        result = {}
        for rank, worker in self.workers.items():
            acks, received = Acks(), set[str]()
            for step in steps:
                worker.fence(step)
                worker.load(step)
                worker.store(step)
            jobs = [job for step in steps for job in (*step.loads, *step.stores)]
            while len(acks.ranks) < len(jobs):
                received |= worker.take_received()
                acks.aggregate(worker.take_acks() or Acks())
            assert received == {job.awaited_by for job in jobs} - {None}
            result[rank] = acks
        return result

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.slab.close()


def transfer(job: int, *rows: tuple[int, int, int], awaited_by: str | None = None) -> Transfer:
    """Return a transfer of rows of a piece, an engine's block and a slot."""
    pieces = [(piece, 1) for piece, *_ in rows]
    blocks, slots = [block for _, block, _ in rows], [slot for *_, slot in rows]
    return Transfer(job, blocks, slots, awaited_by=awaited_by, pieces=pieces)


def slot_bytes(slab: Slab) -> list[bytearray]:
    return [bytearray(slab.view(slot)) for slot in range(SLOTS)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_group_uses_at_most_a_twentieth_more_than_its_unpadded_bytes(
    model: str, layout: str
) -> None:
    ranks = Ranks(MODELS[model], layout=layout)
    for group, parts in zip(kept_groups(ranks.config), ranks.cut.parts, strict=True):
        unpadded = sum(ranks.caches[0, 0].unpadded_nbytes(member) for member in group.members)
        assert unpadded <= parts * ranks.cut.slot_nbytes <= 1.05 * unpadded
    ranks.close()


Row = tuple[int, int, int]


def random_rows(random: Random, cut: BlockCut, slots: list[int]) -> list[Row]:
    """Return rows of random parts in `slots`, for blocks that each have one group."""
    parts = sorted({(piece.group, piece.part) for piece in cut.pieces})
    choices = random.sample(
        [(part, number) for part in parts for number in range(2)], 2 * len(parts)
    )
    free = random.sample(range(BLOCKS), BLOCKS)
    by_number = dict[tuple[int, int], int]()  # block of a member, by its number
    rows = []
    for slot, (part, number) in zip(slots, choices, strict=False):
        for at, piece in enumerate(cut.pieces):
            if (piece.group, piece.part) == part:
                key = (piece.member, number)
                block = by_number[key] = by_number[key] if key in by_number else free.pop()
                rows.append((at, block, slot))
    random.shuffle(rows)
    return rows


def store_in_turn(played: Ranks, rows: list[Row], slots: list[bytearray]) -> None:
    """Write into `slots` what a store of `rows` should write."""
    for at, block, slot in rows:
        piece = played.cut.pieces[at]
        for rank, where in piece.ranks.items():
            held = played.caches[rank].block_bytes(piece.member, block)[where.begin : where.end]
            slots[slot][where.offset : where.offset + len(held)] = held


def load_in_turn(
    caches: GroupedCaches, rank: Rank, played: Ranks, rows: list[Row], slots: list[bytearray]
) -> None:
    """Write into `caches` what a load of `rows` should write."""
    for at, block, slot in rows:
        piece = played.cut.pieces[at]
        if (where := piece.ranks.get(rank)) is not None:
            data = slots[slot][where.offset : where.offset + where.end - where.begin]
            caches.write_block(piece.member, block, where.begin, bytes(data))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    model=st.sampled_from(sorted(MODELS)),
    layout=st.sampled_from(LAYOUTS),
    ranks=st.sampled_from([1, 2]),
    replicated=st.booleans(),
    on_device=st.booleans(),
)
def test_transfers_of_random_pieces_change_exactly_their_bytes(
    seed: int, model: str, layout: str, ranks: int, replicated: bool, on_device: bool
) -> None:
    random = Random(seed)
    device = ReorderingDevice(random) if on_device else None
    played = Ranks(MODELS[model], ranks, layout=layout, device=device, replicated=replicated)
    slots = slot_bytes(played.slab)
    for number in range(3):
        order = random.sample(range(SLOTS), SLOTS)
        stored = random_rows(random, played.cut, order[: SLOTS // 2])
        loaded = random_rows(random, played.cut, order[SLOTS // 2 :])
        store_in_turn(played, stored, slots)
        expected = {rank: caches.clone() for rank, caches in played.caches.items()}
        for rank, caches in expected.items():
            load_in_turn(caches, rank, played, loaded, slots)
        played.run(
            Step(played.memory, stores=[transfer(2 * number, *stored)]),
            Step(played.memory, loads=[transfer(2 * number + 1, *loaded, awaited_by="waits")]),
        )
        assert slot_bytes(played.slab) == slots
        for rank, caches in played.caches.items():
            assert torch.equal(caches.memory, expected[rank].memory)
    played.close()
