"""Two ranks share a slot, which is ready when both ranks have finished their copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import HybridCheckpoint, RunEngine
from tests.support.engine import separate_processes, several_groups
from tests.support.engine.comparison import assert_equal
from tests.support.engine.engine import BLOCK, VOCABULARY, Engine
from tests.support.engine.process import EngineRun, startup
from tests.support.group_hooks import needs_group_hooks, needs_tensor_shards

pytestmark = pytest.mark.engine

NO_OPEN_STATE = {"promised": 0, "running": 0, "jobs": 0, "loads": 0, "pinned": 0}
# vLLM's default thread binding, which needs a memory node per rank; vLLM simulates them.
ENVIRONMENT = {
    "VLLM_CPU_SIM_MULTI_NUMA": "1", "VLLM_CPU_OMP_THREADS_BIND": "", "OMP_NUM_THREADS": "",
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "options": {"distributed_executor_backend": "mp", "tensor_parallel_size": 2},
    "environment": ENVIRONMENT,
}


@pytest.fixture(scope="module")
def two_ranks(run_engine: RunEngine) -> EngineRun:
    acts = (
        separate_processes.two_turns,
        separate_processes.hit_tokens,
        separate_processes.load_that_fails_on_one_rank,
        separate_processes.final_state,
    )
    waiting = {"environment": ENVIRONMENT | {"KVCACHE__L1__WAIT_PINNED": "true"}}
    return run_engine(acts, blocks=40, l1="64MiB", **SETTINGS | waiting)


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine) -> EngineRun:
    return run_engine((separate_processes.two_turns,), blocks=1000, **SETTINGS)


def test_completions_of_two_ranks_equal_those_of_a_large_cache(
    two_ranks: EngineRun, reference: EngineRun
) -> None:
    two_ranks.result_of(startup)  # without the warning that a rank has not attached L1
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


def slot_nbytes(engine: Engine) -> int:
    """Return the bytes of a block in L1, of all ranks together."""
    return int(engine.stack.block_nbytes)


COMPARED = (several_groups.requests_of_one_step, several_groups.prompts_of_several_steps)


def assert_equal_on_two_ranks(run_engine: RunEngine, checkpoint: Path) -> int:
    """Compare two ranks with kvcache and without it; return the bytes of a block in L1."""
    scenarios = (*COMPARED, slot_nbytes, separate_processes.final_state)
    settings = {"checkpoint": str(checkpoint), **SETTINGS}
    kvcache = run_engine(scenarios, blocks=100, l1="64MiB", **settings)
    large = run_engine(COMPARED, blocks=2000, **settings)
    kvcache.result_of(startup)
    for scenario in COMPARED:
        assert_equal(kvcache.result_of(scenario), large.result_of(scenario), tolerance=0.1)
    assert kvcache.result_of(separate_processes.final_state) == NO_OPEN_STATE
    return int(kvcache.result_of(slot_nbytes))


@needs_group_hooks
def test_completions_of_a_window_model_equal_those_of_a_large_cache(
    run_engine: RunEngine, hybrid_checkpoint: HybridCheckpoint
) -> None:
    nbytes = assert_equal_on_two_ranks(run_engine, hybrid_checkpoint("gemma-3"))
    assert nbytes == BLOCK * 2 * 2 * 32 * 2  # one layer: keys and values of two heads


@needs_tensor_shards
def test_kv_head_that_two_ranks_have_is_stored_once(run_engine: RunEngine, tmp_path: Path) -> None:
    from kvcache.cli.demo.checkpoint import write

    write(
        tmp_path,
        layers=2, hidden=128, heads=4, kv_heads=1, head_dim=32, intermediate=256,
        vocabulary=VOCABULARY,
    )  # fmt: skip
    nbytes = assert_equal_on_two_ranks(run_engine, tmp_path)
    assert nbytes == BLOCK * 2 * 2 * 32 * 2  # two layers: keys and values of one head
