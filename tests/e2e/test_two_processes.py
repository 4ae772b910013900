"""vLLM's core, with the scheduler, and its worker run in processes of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.conftest import RunEngine
from tests.support.engine import separate_processes
from tests.support.engine.process import EngineRun, startup

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def separate(run_engine: RunEngine) -> EngineRun:
    return run_engine(
        (
            separate_processes.two_turns,
            separate_processes.hit_tokens,
            separate_processes.slab_processes,
        ),
        blocks=40,
        l1="64MiB",
        options={"distributed_executor_backend": "mp"},
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "KVCACHE__L1__WAIT_PINNED": "true"},
    )


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine) -> EngineRun:
    return run_engine((separate_processes.two_turns,), blocks=1000)


def test_completions_equal_those_of_a_large_cache(
    separate: EngineRun, reference: EngineRun
) -> None:
    separate.result_of(startup)
    assert separate.result_of(separate_processes.two_turns) == reference.result_of(
        separate_processes.two_turns
    )
    assert separate.result_of(separate_processes.hit_tokens) > 0
    assert "kvcache: connector: profile l1-only" in separate.output  # in the format of vLLM's log
    assert not re.search("(WARNING|ERROR).*kvcache: ", separate.output)  # in any of the processes


def test_start_waits_until_the_worker_has_attached_l1(separate: EngineRun) -> None:
    assert "1 of 1 ranks have attached all of L1" in separate.output


def test_end_of_the_processes_frees_all_slabs(separate: EngineRun) -> None:
    facts = separate.result_of(separate_processes.slab_processes)
    assert len(facts["slabs"]) == 2  # the core's and the worker's, not the one that asks
    assert len(facts["family"]) >= 3
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    assert not set(facts["slabs"]) & {pid for pid in everyone if separate_processes.slabs_of(pid)}
