"""Daemon threads with a queue of jobs in which loads go before stores.

Invariants:

* A thread takes the oldest queued load, and a store only when no load is queued.
* A job runs or is dropped, exactly once.
* A thread uses all CPUs of the process, although the thread that made the pool may be pinned.
* A thread continues after any exception of a job. Threads are daemons: a call that hangs does not
  keep the process from exiting.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, PriorityQueue
from typing import TypeVar

from kvcache.process import bind_to_process
from kvcache.thread_cpus import process_cpus, use_cpus

log = logging.getLogger(__name__)

T = TypeVar("T")

LOAD, STORE, STOP = 0, 1, 2
"""Priorities of jobs; threads take the lowest number first."""


def _do_nothing() -> None:
    pass


class WorkerPool:
    """Daemon threads with one priority queue of jobs.

    Args:
        name: part of the threads' names.
        threads: how many jobs run in parallel; with 0, every job is dropped.

    Raises:
        RuntimeError: when a thread cannot be started.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], None], Callable[[], object]]] = (
            PriorityQueue()
        )
        self._sequence = itertools.count()  # the order of jobs of one priority
        self._lock = threading.Lock()
        self._closed = not threads
        self._threads: list[threading.Thread] = []
        cpus = process_cpus()
        try:
            for number in range(threads):
                thread = threading.Thread(
                    target=self._run_jobs,
                    args=(cpus,),
                    name=f"kvcache-{name}-{number}",
                    daemon=True,
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close(0.0)  # end the threads that were started
            raise
        bind_to_process(self)

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The threads of the pool."""
        return tuple(self._threads)

    def add_job(
        self,
        priority: int,
        job: Callable[[], None],
        on_drop: Callable[[], object] = _do_nothing,
    ) -> None:
        """Queue ``job``. If it will never run, ``on_drop`` is called instead."""
        with self._lock:
            if not self._closed:
                self._jobs.put((priority, next(self._sequence), job, on_drop))
                return
        on_drop()

    def submit(self, call: Callable[..., T], *arguments: object) -> Future[T]:
        """Queue ``call(*arguments)``; its future is cancelled if the call will never run."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised by future.result()
                future.set_exception(error)
            else:
                future.set_result(result)

        def on_drop() -> None:
            future.cancel()
            future.set_running_or_notify_cancel()  # wakes threads in concurrent.futures.wait()

        self.add_job(LOAD, job, on_drop)
        return future

    def drop_queued(self) -> None:
        """Drop every job that no thread has taken."""
        queued = []
        with suppress(Empty):
            while True:
                queued.append(self._jobs.get_nowait())
        for priority, number, job, on_drop in queued:
            if priority == STOP:
                self._jobs.put((priority, number, job, on_drop))
            else:
                on_drop()

    def close(self, timeout_s: float) -> None:
        """Take no more jobs, and end the threads once the queue is empty. Idempotent.

        Waits ``timeout_s`` for the threads, but never for the calling thread itself. A thread that
        has not ended by then continues until its job returns.
        """
        with self._lock:
            closed, self._closed = self._closed, True
            for _ in [] if closed else self._threads:
                self._jobs.put((STOP, next(self._sequence), _do_nothing, _do_nothing))
        deadline = time.monotonic() + timeout_s
        current = threading.current_thread()
        for thread in [each for each in self._threads if each is not current]:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run_jobs(self, cpus: Collection[int]) -> None:
        use_cpus(cpus)  # not only that of the thread that made the pool, such as an engine's
        while True:
            priority, _, job, on_drop = self._jobs.get()
            if priority == STOP:
                return
            try:
                job()
            except BaseException:
                log.exception("kvcache: worker pool: a job failed; its thread continues")
            del job, on_drop  # releases the blocks they refer to before the next get() waits
