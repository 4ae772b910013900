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
from kvcache.connectors.vllm.messages import Rank, SlabShards, Step, Transfer
from kvcache.connectors.vllm.scheduler.pieces import BlockCut, cut_blocks
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.slab import Slab, slot_nbytes_for
from tests.support.group_hooks import needs_group_hooks
from tests.support.grouped_caches import (
    GroupedCaches,
    full,
    layers,
    state,
    window,
)
from tests.support.grouped_ranks import BLOCKS, SLOTS, Ranks, Row, slot_bytes, transfer
from tests.support.reordering_device import ReorderingDevice

pytestmark = pytest.mark.engine

MODELS = {
    "windows of five times the layers": layers(window=(52, window()), full=(10, full())),
    "a missing layer in the last group": layers(window=(5, window()), full=(3, full())),
    "states in padded pages": layers(state=(6, state()), full=(2, full())),
    "one kind": layers(full=(3, full())),
    "pages of two sizes": layers(window=(4, window(heads=4)), full=(2, full())),
}
LAYOUTS = ["LBHNC", "LBNHC", "BLHNC", "BLNHC"]


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
    defers_stores=st.booleans(),
)
def test_transfers_of_random_pieces_change_exactly_their_bytes(
    seed: int,
    model: str,
    layout: str,
    ranks: int,
    replicated: bool,
    on_device: bool,
    defers_stores: bool,
) -> None:
    random = Random(seed)
    device = ReorderingDevice(random) if on_device else None
    played = Ranks(
        MODELS[model],
        ranks,
        layout=layout,
        device=device,
        replicas=ranks if replicated else 1,
        defers_stores=defers_stores,
    )
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


def two_kinds(**options: Any) -> Ranks:
    """Return ranks with a group of windows in two parts and one of full attention."""
    return Ranks(layers(window=(4, window()), full=(2, full())), **options)


def pieces_of(ranks: Ranks, kind: str) -> list[int]:
    """Return the pieces of the kept group with this rule."""
    [group] = (group for group in kept_groups(ranks.config) if group.needs.kind == kind)
    return [at for at, piece in enumerate(ranks.cut.pieces) if piece.group == group.index]


@pytest.mark.parametrize("operation", ["load", "store"])
def test_copy_that_fails_at_a_later_piece_fails_its_whole_transfer(
    operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The other async loads of the step succeed. Its stores are one copy, so they fail together."""
    device = ReorderingDevice(Random(0))
    ranks = two_kinds(device=device)
    rows = [(at, 3 + at, at) for at in range(len(ranks.cut.pieces))]
    others = [transfer(3, (0, 2, 6))]
    device.copies_until_error = 3  # the first piece has two runs
    if operation == "load":
        loads = [transfer(1, *rows, awaited_by="a"), transfer(2, (0, 1, 7), awaited_by="b")]
        [acks] = ranks.run(Step(ranks.memory, loads=loads, stores=others)).values()
        assert acks.failed == {1, 3}
        assert ranks.workers[0, 0].take_failed_requests() == {"a"}
    else:
        stores = [transfer(1, *rows), *others]
        [acks] = ranks.run(Step(ranks.memory, stores=stores)).values()
        assert acks.failed == {1, 3}
    assert "failed" in caplog.text
    slots, memory = slot_bytes(ranks.slab), ranks.caches[0, 0].memory.clone()
    device.drain()
    assert (slot_bytes(ranks.slab), torch.equal(ranks.caches[0, 0].memory, memory)) == (slots, True)
    ranks.close()


def test_store_with_an_invalid_block_in_a_later_piece_copies_nothing() -> None:
    ranks = two_kinds()
    store = transfer(1, (0, 1, 0), (1, BLOCKS, 1))
    [acks] = ranks.run(Step(ranks.memory, stores=[store])).values()
    assert acks.failed == {1}
    assert not any(map(any, slot_bytes(ranks.slab)))
    ranks.close()


def test_failed_load_of_several_groups_is_reported_by_its_request() -> None:
    ranks = two_kinds()
    [worker] = ranks.workers.values()
    load = [transfer(1, (len(ranks.cut.pieces), 1, 0), awaited_by="waits")]
    [acks] = ranks.run(Step(ranks.memory, loads=load)).values()
    assert acks.failed == {1}
    assert worker.take_failed_blocks() == set()
    assert worker.take_failed_requests() == {"waits"}
    assert worker.take_failed_requests() == set()
    ranks.close()


@needs_group_hooks
def test_connector_reports_a_failed_load_of_several_groups_as_received_and_failed() -> None:
    """Failed block ids would end vLLM's core."""
    from kvcache.connectors.vllm import KVCacheConnector

    ranks = two_kinds()
    connector = KVCacheConnector.__new__(KVCacheConnector)
    connector.worker_side = ranks.workers[0, 0]
    unknown = len(ranks.cut.pieces)
    loads = [transfer(1, (unknown, 1, 0), awaited_by="a"), transfer(2, (0, 2, 1), awaited_by="b")]
    connector.worker_side.load(Step(ranks.memory, loads=loads))
    results = connector.get_transfer_results(set())
    assert (results.finished_recving, results.failed_recving) == ({"a", "b"}, {"a"})
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector.get_transfer_results(set()).failed_recving == set()
    ranks.close()


@pytest.mark.parametrize("piece", [-1, 99])
def test_piece_that_does_not_exist_fails_the_copy(piece: int) -> None:
    ranks = two_kinds()
    [acks] = ranks.run(Step(ranks.memory, stores=[transfer(1, (piece, 1, 0))])).values()
    assert acks.failed == {1}
    ranks.close()


@pytest.mark.parametrize("absent", [0, 1, 2, 10])
def test_slab_without_a_piece_of_this_rank_fails_every_copy(absent: int) -> None:
    ranks = Ranks(MODELS["windows of five times the layers"])
    pieces = tuple(piece for at, piece in enumerate(ranks.cut.pieces) if at != absent)
    memory = SlabShards(ranks.slab.descriptor, pieces)
    [acks] = ranks.run(Step(memory, stores=[transfer(1, (0, 1, 0))])).values()
    assert acks.failed == {1}
    assert not any(map(any, slot_bytes(ranks.slab)))
    ranks.close()


def test_transfer_without_the_pieces_of_all_blocks_fails() -> None:
    ranks = two_kinds()
    store = Transfer(1, [1, 2], [0, 1], pieces=[(0, 1)])
    [acks] = ranks.run(Step(ranks.memory, stores=[store])).values()
    assert acks.failed == {1}
    ranks.close()


def test_rank_without_a_group_acks_its_copies_and_changes_nothing() -> None:
    """A pipeline stage may have no layer of a group."""
    stages = {(0, 0): two_kinds(), (1, 0): two_kinds()}
    first, last = (stage.workers[0, 0].shard() for stage in stages.values())
    assert first is not None
    assert last is not None
    config = stages[1, 0].config
    emptied = next(
        at for at, group in enumerate(config.kv_cache_groups) if "full0" in group.layer_names
    )
    config.kv_cache_groups[emptied].layer_names = []
    worker = WorkerSide(config, (1, 0), 1)
    worker.register(stages[1, 0].caches[0, 0].caches)
    last = worker.shard()
    assert last is not None
    assert last.nbytes[emptied] == 0
    cut = cut_blocks({(0, 0): first, (1, 0): last}, kept_groups(stages[0, 0].config))
    [piece] = (at for at, each in enumerate(cut.pieces) if each.member == emptied)
    slab = Slab.create(2, slot_nbytes_for(cut.slot_nbytes))
    memory = SlabShards(slab.descriptor, cut.pieces)
    before = stages[1, 0].caches[0, 0].memory.clone()
    load = transfer(1, (piece, 3, 0), awaited_by="waits")
    worker.load(Step(memory, loads=[load]))
    worker.store(Step(memory, stores=[transfer(2, (piece, 3, 1))]))
    assert worker.take_received() == {"waits"}
    acks = worker.take_acks()
    assert acks is not None
    assert (acks.ranks, acks.failed) == ({1: 1, 2: 1}, set())
    assert torch.equal(stages[1, 0].caches[0, 0].memory, before)
    assert not any(slab.view(0))
    worker.close()
    slab.close()
    for stage in stages.values():
        stage.close()


def test_replica_stores_nothing_and_loads_what_its_owner_stored() -> None:
    ranks = two_kinds(ranks=2, replicas=2)
    owner, replica = ranks.caches.values()
    replica.memory.random_(0, 256)  # as if it had computed other bytes
    pieces = pieces_of(ranks, "all")
    acks = ranks.run(Step(ranks.memory, stores=[transfer(1, *((at, 3, 0) for at in pieces))]))
    assert all((each.ranks, each.failed) == ({1: 1}, set()) for each in acks.values())
    assert acks[0, 1].seconds == {1: 0.0}
    loads = [transfer(2, *((at, 5, 0) for at in pieces), awaited_by="waits")]
    ranks.run(Step(ranks.memory, loads=loads))
    member = ranks.cut.pieces[pieces[0]].member
    assert replica.block_bytes(member, 5) == owner.block_bytes(member, 3)
    assert owner.block_bytes(member, 5) == owner.block_bytes(member, 3)
    ranks.close()


def test_register_ignores_aliases_of_layers_of_all_groups() -> None:
    """Layers that share the KV cache of another layer are registered under names of their own."""
    ranks = two_kinds()
    worker = WorkerSide(ranks.config, (0, 0), 1)
    caches = ranks.caches[0, 0].caches
    worker.register(caches | {"alias": caches["window1"], "other alias": caches["full0"]})
    shard, without = worker.shard(), ranks.workers[0, 0].shard()
    assert shard is not None
    assert without is not None
    assert (shard.nbytes, shard.format_id) == (without.nbytes, without.format_id)
    ranks.close()


def test_register_layer_with_several_tensors_raises() -> None:
    ranks = two_kinds()
    worker = WorkerSide(ranks.config, (0, 0), 1)
    caches: dict[str, Any] = dict(ranks.caches[0, 0].caches)
    caches["full1"] = [caches["full1"], caches["full1"]]
    with pytest.raises(RuntimeError, match="KV cache of layer full1 is 2 tensors"):
        worker.register(caches)
    ranks.close()


def test_register_state_in_a_view_of_its_padded_page_copies_the_state_alone() -> None:
    ranks = Ranks(layers(state=(3, state()), full=(1, full())))
    caches = ranks.caches[0, 0].caches
    for name in list(caches):
        if name.startswith("state"):
            stride = caches[name].stride(0)
            caches[name] = caches[name].as_strided((BLOCKS, stride), (stride, 1))
    worker = WorkerSide(ranks.config, (0, 0), 1)
    worker.register(caches)
    shard = worker.shard()
    assert shard is not None
    unpadded = [ranks.caches[0, 0].unpadded_nbytes(at) for at in range(len(shard.nbytes))]
    assert list(shard.nbytes) == unpadded
    ranks.close()


def test_device_that_vllm_writes_before_the_fence_waits_for_stores_in_their_step() -> None:
    """vLLM's second model runner zeroes the new blocks of a step before it calls the connector."""
    for seed in range(10):
        device = ReorderingDevice(Random(seed))
        ranks = Ranks(layers(state=(2, state()), full=(1, full())), device=device)
        [worker], [caches] = ranks.workers.values(), ranks.caches.values()
        stored = caches.block_bytes(0, 3)
        piece = next(at for at, each in enumerate(ranks.cut.pieces) if each.member == 0)
        step = Step(ranks.memory, stores=[transfer(1, (piece, 3, 0))])
        worker.load(step)
        worker.store(step)
        device.engine_stream().queue.append(caches.memory.zero_)
        device.drain()
        where = ranks.cut.pieces[piece].ranks[0, 0]
        view = bytes(ranks.slab.view(0))[where.offset : where.offset + where.end - where.begin]
        assert view == stored[where.begin : where.end]
        ranks.close()
