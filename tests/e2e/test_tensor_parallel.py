"""Two ranks: a slot holds the block of both, and is good only when both are through with it."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine import separate_processes
from tests.support.engine.engine import BLOCK
from tests.support.engine.process import Play, starts

pytestmark = pytest.mark.engine

NOTHING = {"promised": 0, "running": 0, "jobs": 0, "loads": 0, "pinned": 0}
SETTINGS = {
    "options": {"distributed_executor_backend": "mp", "tensor_parallel_size": 2},
    # The default thread binding; one host has one memory node here, and two are pretended.
    "environment": {
        "VLLM_CPU_SIM_MULTI_NUMA": "1", "VLLM_CPU_OMP_THREADS_BIND": "", "OMP_NUM_THREADS": "",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def both(stage: Stage) -> Play:
    acts = (
        separate_processes.turns,
        separate_processes.hits,
        separate_processes.one_rank_fails,
        separate_processes.ends,
    )
    return stage(acts, blocks=40, l1="64MiB", **SETTINGS)


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage((separate_processes.turns,), blocks=1000, **SETTINGS)


def test_answers_and_hits(both: Play, reference: Play) -> None:
    both.of(starts)
    assert both.of(separate_processes.turns) == reference.of(separate_processes.turns)
    assert both.of(separate_processes.hits) > 0


def test_a_load_that_fails_on_one_rank(both: Play) -> None:
    facts = both.of(separate_processes.one_rank_fails)
    assert facts["step"] == {"dropped": 5, "stored": 0, "pinned": 0}
    assert facts["tokens"] == [facts["right"], facts["right"]]
    assert facts["held"] == [True] * 6
    assert facts["again"] == 6 * BLOCK
    assert facts["ends"] == NOTHING
    assert "load of 5 blocks failed" in both.output


def test_no_end_is_open(both: Play) -> None:
    assert both.of(separate_processes.ends) == NOTHING
