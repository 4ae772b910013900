"""Copies between an engine's blocks and leased slots, from their start to the last rank's ack.

A connector for any engine uses this module in the process of the engine's scheduler. A *job* is one
copy, a load or a store; each rank copies its own shard. An *ack* is a rank's report that its part
has succeeded or failed.

Invariants:

1. The lease of a job ends once, when every rank has acknowledged the job. If one rank failed, the
   job failed: the blocks of a load are dropped, those of a store are not published, and the request
   offers its blocks again.
2. When a load fails, every store in progress fails, also one that the same acks end: it may have
   read blocks computed from blocks that the load did not write.
3. A request may end at any time. Its jobs continue until their last ack, so no slot is reused while
   a rank may still copy it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, Literal, TypeVar

from kvcache.tier import Lease

R = TypeVar("R")  # the engine's own class of requests

_NO_SECONDS: Mapping[int, float] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class AdmittedRequest(Generic[R]):
    """A request that has blocks of the engine.

    Attributes:
        request: the engine's own object.
        tables: the engine's numbers of its blocks, in the order of its tokens; one table for each
            of the engine's KV cache groups.
        offered: leading blocks that were offered to the stack; one number for each group of blocks
            that are stored together.
        first_suspect: the first token of its first suspect block (`SuspectBlocks`): it stores no
            block from there on; ``None`` if there is none.
        examined: whether the blocks that the request did not compute were checked for suspects.
    """

    request: R
    tables: list[list[int]]
    offered: list[int] = field(default_factory=lambda: [0])
    first_suspect: int | None = None
    examined: bool = False

    def unoffered(self, complete: int, block_tokens: int, group: int = 0) -> range:
        """Return the positions to offer next, where ``complete`` leading blocks are computed."""
        offered = self.offered[group]
        if self.first_suspect is not None:
            complete = min(complete, self.first_suspect // block_tokens)
        return range(offered, max(offered, complete))


@dataclass(frozen=True, slots=True)
class BlockCopies:
    """What a job copies: engine block ``blocks[i]`` and slot ``slots[i]``, for every i.

    Attributes:
        pieces: for engines with blocks of several kinds: the number of a kind, and how many of the
            next blocks are of it; in order.
    """

    blocks: list[int]
    slots: list[int]
    pieces: list[tuple[int, int]]

    @classmethod
    def of_one_kind(cls, blocks: Sequence[int], slots: Sequence[int]) -> BlockCopies:
        """Return the copies of an engine with blocks of one kind."""
        return cls(list(blocks), list(slots), [(0, len(blocks))])


@dataclass(slots=True)
class Job(Generic[R]):
    """A copy in progress.

    Attributes:
        firsts: position of the job's first block among the blocks of ``request``, by group.
        acks: ranks that have acknowledged it.
        seconds: of the slowest rank.
    """

    number: int
    operation: Literal["load", "store"]
    request: AdmittedRequest[R]
    lease: Lease
    copies: BlockCopies
    firsts: Sequence[int]
    acks: int = 0
    failed: bool = False
    seconds: float = 0.0


class Jobs(Generic[R]):
    """The jobs in progress. Each is copied by ``ranks`` ranks."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._last = 0
        self._jobs: dict[int, Job[R]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def start(
        self,
        operation: Literal["load", "store"],
        request: AdmittedRequest[R],
        lease: Lease,
        copies: BlockCopies,
        firsts: Sequence[int] = (0,),
    ) -> Job[R] | None:
        """Start to copy between blocks of ``request`` and slots of ``lease``.

        If there is nothing to copy, the lease ends here.

        Args:
            operation: a load's lease has blocks to read, a store's has slots to fill.
            request: the request.
            lease: it ends with the job.
            copies: some or all slots of the lease, and the engine's blocks.
            firsts: for each group, the position of the first block that is copied or was offered.
        """
        if not copies.blocks:
            lease.end()
            return None
        self._last += 1
        job = Job(self._last, operation, request, lease, copies, firsts)
        self._jobs[job.number] = job
        return job

    def fail_stores(self) -> None:
        """Fail every store in progress: blocks that it may depend on were not loaded."""
        for job in self._jobs.values():
            job.failed |= job.operation == "store"

    def acknowledge(
        self,
        acks: Mapping[int, int],
        failed: Collection[int] = (),
        seconds: Mapping[int, float] = _NO_SECONDS,
    ) -> list[Job[R]]:
        """Count acks, and end the jobs that every rank has acknowledged.

        Args:
            acks: by number of the job, how many ranks acknowledge it now.
            failed: numbers of the jobs that failed on one of them.
            seconds: by number of the job, the duration of its copy on the slowest rank.

        Returns:
            the jobs that ended.
        """
        if any(self._jobs[number].operation == "load" for number in failed):
            self.fail_stores()
        ended = []
        for number, ranks in acks.items():
            job = self._jobs[number]
            job.acks += ranks
            job.failed |= number in failed
            job.seconds = max(job.seconds, seconds.get(number, 0.0))
            if job.acks == self._ranks:
                del self._jobs[number]
                if job.failed:
                    offered = job.request.offered
                    offered[:] = map(min, offered, job.firsts)
                job.lease.end(failed=job.lease.keys if job.failed else ())
                ended.append(job)
        return ended
