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
        blocks: the engine's numbers of its blocks, in the order of its tokens.
        offered: leading blocks that were offered to the stack.
        first_suspect: position of its first suspect block (`SuspectBlocks`): it stores no block
            from there on; ``None`` if there is none.
        examined: whether the blocks that the request did not compute were checked for suspects.
    """

    request: R
    blocks: list[int] = field(default_factory=list)
    offered: int = 0
    first_suspect: int | None = None
    examined: bool = False

    def unoffered(self, complete: int) -> range:
        """Return the positions to offer next, where ``complete`` leading blocks are computed."""
        if self.first_suspect is not None:
            complete = min(complete, self.first_suspect)
        return range(self.offered, max(self.offered, complete))


@dataclass(slots=True)
class Job(Generic[R]):
    """A copy in progress: engine block ``blocks[i]`` and slot ``slots[i]``, for every i.

    Attributes:
        first: position of the job's first block among the blocks of ``request``.
        acks: ranks that have acknowledged it.
        seconds: of the slowest rank.
    """

    number: int
    operation: Literal["load", "store"]
    request: AdmittedRequest[R]
    first: int
    lease: Lease
    blocks: list[int]
    slots: list[int]
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

    def start_load(
        self, request: AdmittedRequest[R], lease: Lease, first: int, count: int
    ) -> Job[R] | None:
        """Start to load the first ``count`` blocks of ``lease``, which `pin` or `fetch` returned.

        They go to the blocks of ``request`` from position ``first`` on. If there is nothing to
        copy, the lease ends here.
        """
        if not count:
            lease.end()
            return None
        blocks = request.blocks[first : first + count]
        return self._start("load", request, first, lease, blocks, lease.slots[:count])

    def start_store(
        self, request: AdmittedRequest[R], lease: Lease, offered: range
    ) -> Job[R] | None:
        """Start to store what ``lease`` reserved, of the blocks at the positions ``offered``.

        If there is nothing to copy, the lease ends here.
        """
        request.offered = offered.stop
        if not lease.keys:
            lease.end()
            return None
        blocks = [request.blocks[offered[at]] for at in lease.positions]
        return self._start("store", request, offered.start, lease, blocks, lease.slots)

    def _start(
        self,
        operation: Literal["load", "store"],
        request: AdmittedRequest[R],
        first: int,
        lease: Lease,
        blocks: list[int],
        slots: Sequence[int],
    ) -> Job[R]:
        self._last += 1
        job = Job(self._last, operation, request, first, lease, blocks, list(slots))
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
                    job.request.offered = min(job.request.offered, job.first)
                job.lease.end(failed=job.lease.keys if job.failed else ())
                ended.append(job)
        return ended
