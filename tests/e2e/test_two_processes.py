"""The engine's core with its scheduler, and the worker, in processes of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e import processes
from tests.e2e.conftest import Stage
from tests.e2e.engine import Play, starts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def apart(stage: Stage) -> Play:
    return stage(
        (processes.turns, processes.hits, processes.memory),
        blocks=40,
        l1="64MiB",
        options={"distributed_executor_backend": "mp"},
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage((processes.turns,), blocks=1000)


def test_answers_and_hits(apart: Play, reference: Play) -> None:
    apart.of(starts)
    assert apart.of(processes.turns) == reference.of(processes.turns)
    assert apart.of(processes.hits) > 0
    assert "kvcache: profile l1-only" in apart.output  # said as vLLM says things
    assert not re.search("(WARNING|ERROR).*kvcache: ", apart.output)  # in any of the processes


def test_the_memory_goes_with_its_processes(apart: Play) -> None:
    facts = apart.of(processes.memory)
    assert len(facts["slabs"]) == 2  # the core's and the worker's, not the one that asks
    assert len(facts["family"]) >= 3
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    assert not set(facts["slabs"]) & {pid for pid in everyone if processes.slabs_of(pid)}
