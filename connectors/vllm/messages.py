"""The messages between the scheduler's process and its workers.

Invariants:

1. No keys go to a worker and no tensors to the scheduler: block, slot and job numbers do.
2. Every message is picklable and small: a few integers for each block.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvcache import telemetry
from kvcache.connectors.jobs import Job
from kvcache.connectors.vllm.attach_pipes import AttachPipes
from kvcache.slab import SlabDescriptor

Rank = tuple[int, int]  # (pipeline rank, tensor rank)


@dataclass(frozen=True, slots=True)
class Shard(KVConnectorHandshakeMetadata):
    """Worker to scheduler, in vLLM's handshake at start: one rank's shard of the blocks.

    Attributes:
        nbytes: of the shard of one block of each of vLLM's groups, without padding; 0 where this
            rank has no layer of a group.
        host: which host the worker is on (`host_name`).
        format_id: the order in which this device's attention stores the bytes.
        element_nbytes: bytes of a number.
        async_copies: whether copies run in parallel to the engine's steps.
        replicas: how many consecutive tensor ranks have the same bytes, for each of vLLM's groups;
            empty if no rank has the bytes of another one.
        nodes: the NUMA nodes that are nearest to this rank; empty if that makes no difference.
        pipes: by which the scheduler's process announces L1; ``None``: the first step does.
    """

    nbytes: tuple[int, ...]
    host: str
    format_id: str
    element_nbytes: int = 2
    async_copies: bool = False
    replicas: tuple[int, ...] = ()
    pipes: AttachPipes | None = None
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal(KVConnectorHandshakeMetadata):
    """Worker to scheduler, in place of a `Shard`: the reason why this rank keeps no blocks."""

    reason: str


@dataclass(frozen=True, slots=True)
class PieceOfRank:
    """Where one rank has a piece.

    Attributes:
        begin: first byte of the piece in the rank's shard of a block of the member. A shard is the
            pages of its layers, one after another.
        end: the byte after the last one.
        offset: of the piece in a slot, in bytes.
        stores: whether the rank stores the piece. If not, another rank stores the same bytes, and
            this rank loads them.
    """

    begin: int
    end: int
    offset: int
    stores: bool = True


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes that one part of a kept group's block has of one of vLLM's groups.

    Attributes:
        group: number of the kept group.
        member: number of vLLM's group.
        part: number of the part.
        ranks: where each rank has the piece; without the ranks that have no byte of it.
    """

    group: int
    member: int
    part: int
    ranks: Mapping[Rank, PieceOfRank]


@dataclass(frozen=True)
class SlabShards:
    """Scheduler to workers: the slab, and the pieces of blocks that its slots hold.

    It is in every step, so each process pickles or unpickles it once.

    Attributes:
        pieces: in the order of kept groups, then of parts, then of members.
    """

    slab: SlabDescriptor
    pieces: tuple[Piece, ...]

    def __reduce__(self) -> tuple[Callable[[bytes], SlabShards], tuple[bytes]]:
        return _unpickled_shards, (self._pickled,)

    @cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps((self.slab, self.pieces))


@lru_cache(maxsize=1)
def _unpickled_shards(pickled: bytes) -> SlabShards:
    return SlabShards(*pickle.loads(pickled))


@dataclass(frozen=True, slots=True)
class Transfer:
    """Scheduler to workers: one job, of engine block ``blocks[i]`` and slot ``slots[i]``.

    Attributes:
        job: its number.
        blocks: the engine's block numbers.
        slots: as many slots of the slab.
        trace: context of the lease's span; empty if that is not recorded.
        awaited_by: of an async load, the request that vLLM schedules when it has ended; ``None``
            for a load that the forward pass of its own step waits for.
        pieces: ``(number of a piece, how many of the next entries are of it)``; by default, all
            entries are of piece 0.
    """

    job: int
    blocks: list[int]
    slots: list[int]
    trace: dict[str, str] = field(default_factory=dict)
    awaited_by: str | None = None
    pieces: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.pieces:
            self.pieces.append((0, len(self.blocks)))

    @classmethod
    def of(cls, job: Job[Any], awaited_by: str | None = None) -> Transfer:
        """Return the transfer of a job."""
        trace = telemetry.trace_headers(job.lease.span)
        copies = job.copies
        return cls(job.number, copies.blocks, copies.slots, trace, awaited_by, copies.pieces)


@dataclass(slots=True)
class Step(KVConnectorMetadata):
    """Scheduler to workers, in every scheduler step: vLLM's KV connector metadata.

    Loads come before the forward pass, stores after it.

    Attributes:
        fresh: blocks that vLLM gave to the requests of this step, and may write.
    """

    memory: SlabShards
    loads: list[Transfer] = field(default_factory=list)
    stores: list[Transfer] = field(default_factory=list)
    number: int = 0
    fresh: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Acks(KVConnectorWorkerMetadata):
    """Workers to scheduler, in every step; vLLM aggregates those of all ranks.

    Attributes:
        ranks: by job, how many ranks acknowledge it.
        failed: jobs that failed on one of these ranks.
        step: number of the step that has ended; 0 if none. A job may end in a later step.
        seconds: by job, the duration of the copies on the slowest rank.
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
        for job, seconds in other.seconds.items():
            self.seconds[job] = max(self.seconds.get(job, 0.0), seconds)
        self.failed |= other.failed
        return self
