"""Copies between an engine's blocks and leased slots, from their begin to the last rank's ack.

Always true here, for any engine:

* The lease of a job ends once, when every rank has acknowledged the job. If one rank failed, the
  job failed: the blocks of a load are dropped, those of a store are not published.
* When a load fails, every store that has not ended fails, also one that the same acks end: it may
  have read what was computed from blocks that the load did not write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from kvcache.tier import Lease

Owner = TypeVar("Owner")


@dataclass(slots=True)
class Job(Generic[Owner]):
    """A copy under way. ``at`` is the place of its first block among the blocks of ``owner``."""

    lease: Lease
    owner: Owner
    at: int
    operation: Literal["load", "store"]
    acks: int = 0
    failed: bool = False
    seconds: float = 0.0  # of the slowest rank


class Jobs(Generic[Owner]):
    """The jobs under way, by number. ``ranks`` copy for each of them."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._last = 0
        self._jobs: dict[int, Job[Owner]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def begin(self, job: Job[Owner]) -> int:
        """Add a job; its number is returned."""
        self._last += 1
        self._jobs[self._last] = job
        return self._last

    def fail_stores(self) -> None:
        """Fail every store under way: blocks that it may depend on were not loaded."""
        for job in self._jobs.values():
            job.failed |= job.operation == "store"

    def acked(
        self, ranks: Mapping[int, int], failed: Collection[int], seconds: Mapping[int, float]
    ) -> list[Job[Owner]]:
        """Count acks, and end the jobs that every rank has acknowledged.

        Args:
            ranks: by job, how many ranks acknowledge it now.
            failed: the jobs that failed on one of them.
            seconds: by job, what its copy took on the slowest of them.

        Returns:
            the jobs that have ended.
        """
        if any(self._jobs[number].operation == "load" for number in failed):
            self.fail_stores()
        ended = []
        for number, count in ranks.items():
            job = self._jobs[number]
            job.acks += count
            job.failed |= number in failed
            job.seconds = max(job.seconds, seconds.get(number, 0.0))
            if job.acks == self._ranks:
                del self._jobs[number]
                job.lease.end(failed=job.lease.keys if job.failed else ())
                ended.append(job)
        return ended
