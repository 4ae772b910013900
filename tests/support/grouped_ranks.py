"""The workers of several tensor ranks, with KV caches that vLLM grouped and allocated."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.groups import kept_groups
from kvcache.connectors.vllm.messages import Acks, Rank, SlabShards, Step, Transfer
from kvcache.connectors.vllm.scheduler.pieces import cut_blocks
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.slab import Slab, slot_nbytes_for
from tests.support.grouped_caches import grouped_caches
from tests.support.reordering_device import ReorderingDevice

SLOTS, BLOCKS = 8, 16


class Ranks:
    """The workers of tensor ranks, each with a KV cache of its own, and one slab.

    Args:
        specs: of each rank's layers.
        ranks: how many.
        layout: vLLM's name of the order of axes.
        replicas: how many consecutive ranks hold the same bytes, for each group of vLLM or for all.
        device: that the ranks are on; ``None`` for the CPU.
        defers_stores: whether the stores of a step start in the next one, if there is a device.
    """

    def __init__(
        self,
        specs: dict[str, Any],
        ranks: int = 1,
        *,
        layout: str = "LBHNC",
        replicas: int | tuple[int, ...] = 1,
        device: ReorderingDevice | None = None,
        defers_stores: bool = False,
    ) -> None:
        first = grouped_caches(specs, layout=layout, blocks=BLOCKS)
        self.caches = {(0, 0): first}
        if isinstance(replicas, int):
            replicas = (replicas,) * len(first.config.kv_cache_groups)
        for rank in range(1, ranks):
            owner = rank // min(replicas) * min(replicas)
            self.caches[0, rank] = other = self.caches.get((0, owner), first).clone()
            if owner == rank:
                other.memory.random_(0, 256)
        self.workers = {
            each: WorkerSide(
                caches.config,
                each,
                1,
                device=device,
                replicas=replicas,
                defers_stores=defers_stores,
            )
            for each, caches in self.caches.items()
        }
        self.shards = {}
        for each, worker in self.workers.items():
            worker.register(self.caches[each].caches)
            shard = worker.shard()
            assert shard is not None
            self.shards[each] = shard
        self.config = self.caches[0, 0].config
        self.cut = cut_blocks(self.shards, kept_groups(self.config))
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


Row = tuple[int, int, int]
"""A piece, an engine's block and a slot."""


def transfer(job: int, *rows: Row, awaited_by: str | None = None) -> Transfer:
    """Return a transfer of these rows."""
    pieces = [(piece, 1) for piece, *_ in rows]
    blocks, slots = [block for _, block, _ in rows], [slot for *_, slot in rows]
    return Transfer(job, blocks, slots, awaited_by=awaited_by, pieces=pieces)


def slot_bytes(slab: Slab) -> list[bytearray]:
    return [bytearray(slab.view(slot)) for slot in range(SLOTS)]
