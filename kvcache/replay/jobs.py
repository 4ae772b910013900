"""Runs many replays of one trace in several processes.

Invariants: results are in the order of the jobs, and the trace is sent to each process once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import NamedTuple

from kvcache.replay.belady import Optimum, optimum
from kvcache.replay.groups import GroupsOutcome, ModelBlocks, replay_model
from kvcache.replay.simulate import Outcome, replay
from kvcache.replay.trace import Trace

_POLL_S = 0.1  # between two progress reports of the other processes


class ReplayJob(NamedTuple):
    """A replay of the trace.

    Attributes:
        policy: name of the eviction policy; ``None`` computes the optimum.
        capacities: blocks of each tier, L1 first; the optimum is that of their sum.
        model: the groups of a model; ``None`` replays one group.
    """

    policy: str | None
    capacities: tuple[int, ...]
    model: ModelBlocks | None = None


Result = Outcome | Optimum | GroupsOutcome
"""The result of a job: with a model a ``GroupsOutcome``, without a policy an ``Optimum``."""


Progress = Callable[[int], None]
"""Receives the number of requests replayed since the last call."""


class JobError(RuntimeError):
    """A policy raised an exception, or a process ended too early."""


def cpu_count() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    trace: Trace, jobs: Sequence[ReplayJob], processes: int, progress: Progress
) -> list[Result]:
    """Run ``jobs``, at most ``processes`` in parallel; with one process, in this process.

    Raises:
        JobError: as soon as a job fails; the remaining jobs are cancelled.
    """
    processes = min(processes, len(jobs))
    if processes <= 1:
        return [_run_job(trace, job, progress) for job in jobs]
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    replayed: Synchronized[int] = context.Value("q", 0)
    reported = 0
    with ProcessPoolExecutor(processes, context, _init_worker, (trace, replayed)) as pool:
        futures = [pool.submit(_run_in_worker, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, _POLL_S)
            progress(replayed.value - reported)
            reported = replayed.value
            if any(future.exception() for future in ended):
                pool.shutdown(cancel_futures=True)
                break
    try:
        return [future.result() for future in futures if not future.cancelled()]
    except BrokenProcessPool as error:
        raise JobError("a worker process was killed; was there enough memory?") from error


def _run_job(trace: Trace, job: ReplayJob, progress: Progress) -> Result:
    if job.policy is None:
        result = optimum(trace, sum(job.capacities))
        progress(len(trace))
        return result
    try:
        if job.model is not None:
            return replay_model(trace, job.model, job.policy, job.capacities[0], progress)
        return replay(trace, job.policy, job.capacities, progress)
    except Exception as error:  # a user's policy may raise anything
        raise JobError(f"policy {job.policy}: {type(error).__name__}: {error}") from error


# In a worker process

_trace: Trace
_replayed: Synchronized[int]


def _init_worker(trace: Trace, replayed: Synchronized[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent process handles Ctrl-C
    global _trace, _replayed
    _trace, _replayed = trace, replayed


def _run_in_worker(job: ReplayJob) -> Result:
    return _run_job(_trace, job, _count_replayed)


def _count_replayed(requests: int) -> None:
    with _replayed.get_lock():
        _replayed.value += requests
