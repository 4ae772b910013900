"""The engine's core with its scheduler, and the worker, in processes of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine import separate_processes
from tests.support.engine.process import Play, starts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def apart(stage: Stage) -> Play:
    return stage(
        (separate_processes.turns, separate_processes.hits, separate_processes.memory),
        blocks=40,
        l1="64MiB",
        options={"distributed_executor_backend": "mp"},
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage((separate_processes.turns,), blocks=1000)


def test_answers_and_hits(apart: Play, reference: Play) -> None:
    apart.of(starts)
    assert apart.of(separate_processes.turns) == reference.of(separate_processes.turns)
    assert apart.of(separate_processes.hits) > 0
    assert "kvcache: profile l1-only" in apart.output  # said as vLLM says things
    assert not re.search("(WARNING|ERROR).*kvcache: ", apart.output)  # in any of the processes


def test_the_memory_goes_with_its_processes(apart: Play) -> None:
    facts = apart.of(separate_processes.memory)
    assert len(facts["slabs"]) == 2  # the core's and the worker's, not the one that asks
    assert len(facts["family"]) >= 3
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    assert not set(facts["slabs"]) & {pid for pid in everyone if separate_processes.slabs_of(pid)}
