"""Two ranks share a slot, which is ready when both ranks have finished their copies."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import RunEngine
from tests.support.engine import separate_processes
from tests.support.engine.engine import BLOCK
from tests.support.engine.process import EngineRun, startup

pytestmark = pytest.mark.engine

NO_OPEN_STATE = {"promised": 0, "running": 0, "jobs": 0, "loads": 0, "pinned": 0}
SETTINGS = {
    "options": {"distributed_executor_backend": "mp", "tensor_parallel_size": 2},
    # vLLM's default thread binding, which needs a memory node per rank; vLLM simulates them.
    "environment": {
        "VLLM_CPU_SIM_MULTI_NUMA": "1", "VLLM_CPU_OMP_THREADS_BIND": "", "OMP_NUM_THREADS": "",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(run_engine: RunEngine) -> EngineRun:
    acts = (
        separate_processes.two_turns,
        separate_processes.hit_tokens,
        separate_processes.load_that_fails_on_one_rank,
        separate_processes.final_state,
    )
    return run_engine(acts, blocks=40, l1="64MiB", **SETTINGS)


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine) -> EngineRun:
    return run_engine((separate_processes.two_turns,), blocks=1000, **SETTINGS)


def test_completions_of_two_ranks_equal_those_of_a_large_cache(
    two_ranks: EngineRun, reference: EngineRun
) -> None:
    two_ranks.result_of(startup)
    assert two_ranks.result_of(separate_processes.two_turns) == reference.result_of(
        separate_processes.two_turns
    )
    assert two_ranks.result_of(separate_processes.hit_tokens) > 0


def test_load_that_fails_on_one_rank_is_recomputed(two_ranks: EngineRun) -> None:
    facts = two_ranks.result_of(separate_processes.load_that_fails_on_one_rank)
    assert facts["step"] == {"dropped": 5, "stored": 0, "pinned": 0}
    assert facts["tokens"] == [facts["right"], facts["right"]]
    assert facts["held"] == [True] * 6
    assert facts["again"] == 6 * BLOCK
    assert facts["ends"] == NO_OPEN_STATE
    assert "load of 5 blocks failed" in two_ranks.output


def test_all_scenarios_leave_no_open_state(two_ranks: EngineRun) -> None:
    assert two_ranks.result_of(separate_processes.final_state) == NO_OPEN_STATE
