"""What crosses between the scheduler's process and its workers.

Always true here:

* No keys go to a worker, no tensors to the scheduler: block numbers, slot numbers and job numbers.
* Everything is picklable and small: a few integers per block moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvcache.slab import SlabDescriptor

Rank = tuple[int, int]  # (pipeline rank, tensor rank)


@dataclass(frozen=True, slots=True)
class Shard(KVConnectorHandshakeMetadata):
    """Worker to scheduler, at start: what one rank keeps of a block, and on which host it is."""

    nbytes: int
    host: str
    format_id: str  # of the bytes: how the attention of this device lays them out
    element_nbytes: int = 2  # of the numbers they are
    async_copies: bool = False  # whether copies go on beside the engine's steps


@dataclass(frozen=True, slots=True)
class Refusal(KVConnectorHandshakeMetadata):
    """Worker to scheduler, at start, in place of a `Shard`: why this rank keeps no blocks."""

    reason: str


@dataclass(frozen=True, slots=True)
class SlabShards:
    """Scheduler to workers: the slab, and where in a slot the shard of each rank begins."""

    slab: SlabDescriptor
    offsets: Mapping[Rank, int]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One job: block ``blocks[i]`` of the engine and slot ``slots[i]`` of the slab, for every i.

    ``awaited_by`` is the request that vLLM schedules when this load is over; without one the load
    is for the step that it comes with.
    """

    job: int
    blocks: list[int]
    slots: list[int]
    trace: dict[str, str] = field(default_factory=dict)  # of its lease's span, where recorded
    awaited_by: str | None = None


@dataclass(slots=True)
class Step(KVConnectorMetadata):
    """Scheduler to workers, every step. Loads come before the forward pass, stores after it.

    ``fresh`` are the blocks that this step's requests are given, which the engine may write.
    """

    memory: SlabShards
    loads: list[Transfer] = field(default_factory=list)
    stores: list[Transfer] = field(default_factory=list)
    number: int = 0
    fresh: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Acks(KVConnectorWorkerMetadata):
    """Workers to scheduler: how many ranks are through with a job, and the jobs that failed.

    ``step`` is the number of the step that has ended; 0 is none. Jobs may end later than the step
    they were of. ``seconds`` is what the copies of a job took, of the slowest rank.
    """

    ranks: dict[int, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    step: int = 0
    seconds: dict[int, float] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Acks:
        assert isinstance(other, Acks)
        self.step = max(self.step, other.step)
        for job, ranks in other.ranks.items():
            self.ranks[job] = self.ranks.get(job, 0) + ranks
        for job, took in other.seconds.items():
            self.seconds[job] = max(self.seconds.get(job, 0.0), took)
        self.failed |= other.failed
        return self
