"""Many replays of one trace, in several processes.

Always true: results come in the order of what was asked for, whoever was done first, and each
process has the trace once.
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
from kvcache.replay.simulate import Outcome, replay
from kvcache.replay.trace import Trace

LOOK_S = 0.1  # between two looks at how far the other processes are


class ReplayJob(NamedTuple):
    """Replay with a policy, or with knowledge of what comes (``policy`` is ``None``)."""

    policy: str | None
    capacities: tuple[int, ...]  # blocks of each tier, L1 first; the optimum is of their sum


Told = Callable[[int], None]
"""Takes the number of requests replayed since it was last called."""


class JobError(RuntimeError):
    """A policy raised an exception, or a process ended before it was done."""


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    trace: Trace, jobs: Sequence[ReplayJob], processes: int, told: Told
) -> list[Outcome | Optimum]:
    """Do ``jobs``, at most ``processes`` at once; one process is this one.

    Raises:
        JobError: when a policy fails; the others are not waited for.
    """
    processes = min(processes, len(jobs))
    if processes <= 1:
        return [_do(trace, job, told) for job in jobs]
    context = multiprocessing.get_context("spawn")  # what threads there are is not copied
    done: Synchronized[int] = context.Value("q", 0)
    seen = 0
    with ProcessPoolExecutor(processes, context, _begin, (trace, done)) as pool:
        futures = [pool.submit(_work, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, LOOK_S)
            told(done.value - seen)
            seen = done.value
            if any(future.exception() for future in ended):
                pool.shutdown(cancel_futures=True)
                break
    try:
        return [future.result() for future in futures if not future.cancelled()]
    except BrokenProcessPool as error:
        raise JobError("a process was ended from outside; was there enough memory?") from error


def _do(trace: Trace, job: ReplayJob, told: Told) -> Outcome | Optimum:
    if job.policy is None:
        found = optimum(trace, sum(job.capacities))
        told(len(trace))
        return found
    try:
        return replay(trace, job.policy, job.capacities, told)
    except Exception as error:  # a policy of somebody else may raise anything
        raise JobError(f"policy {job.policy}: {type(error).__name__}: {error}") from error


# In the other processes

_trace: Trace
_done: Synchronized[int]


def _begin(trace: Trace, done: Synchronized[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is answered by the one who started us
    global _trace, _done
    _trace, _done = trace, done


def _work(job: ReplayJob) -> Outcome | Optimum:
    return _do(_trace, job, _tell)


def _tell(requests: int) -> None:
    with _done.get_lock():
        _done.value += requests
