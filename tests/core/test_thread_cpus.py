"""Background threads of an engine that is pinned to one CPU use all CPUs of the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from kvcache import slab
from kvcache.slab import PAGE, Slab
from kvcache.thread_cpus import process_cpus
from kvcache.worker_pool import WorkerPool

CPUS = os.sched_getaffinity(0)

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")


@pytest.fixture(autouse=True)
def pinned() -> Iterator[None]:
    """Pin the test's thread to one CPU, beside a thread that may use all."""
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    os.sched_setaffinity(0, {min(CPUS)})
    yield
    os.sched_setaffinity(0, CPUS)
    end.set()
    other.join()


def test_process_cpus_are_those_of_all_threads() -> None:
    assert os.sched_getaffinity(0) == {min(CPUS)}
    assert process_cpus() == CPUS


def test_worker_pool_of_a_pinned_thread_uses_all_cpus() -> None:
    pool = WorkerPool("test", 2)
    met = threading.Barrier(2)  # so that each thread runs one job

    def used_cpus() -> set[int]:
        met.wait()
        return os.sched_getaffinity(0)

    futures = [pool.submit(used_cpus) for _ in range(2)]
    assert [future.result() for future in futures] == [CPUS, CPUS]
    pool.close(10.0)


def test_populate_from_a_pinned_thread_uses_all_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "EXTENT_NBYTES", PAGE)
    found: list[set[int]] = []
    memory = Slab.create(3, PAGE)
    memory.populate(lambda _: found.append(os.sched_getaffinity(0)))
    memory.wait_populated()
    memory.close()
    assert found == [{min(CPUS)}, CPUS, CPUS]  # the first extent is allocated by the caller
