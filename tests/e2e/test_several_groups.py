"""Models with several KV cache groups: completions equal those of an engine that keeps everything.

The memory of vLLM's own cache is overwritten between completions (`Engine.overwrite_own_cache`).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.e2e.conftest import HybridCheckpoint, RunEngine
from tests.support.engine import async_copies, one_engine, several_groups
from tests.support.engine.comparison import assert_close, assert_equal, assert_no_open_state
from tests.support.engine.hybrid_models import LARGE, MODELS, HybridModel
from tests.support.engine.process import EngineRun, Scenario, startup
from tests.support.group_hooks import needs_group_hooks, needs_tensor_shards

pytestmark = [pytest.mark.engine, needs_group_hooks]

COMPARED = (
    *several_groups.EQUAL, *several_groups.CLOSE,
    several_groups.failed_load, several_groups.failed_store,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ComparedRuns:
    """The same scenarios on an engine with kvcache and on one that keeps everything."""

    model: HybridModel
    kvcache: EngineRun
    reference: EngineRun


@pytest.fixture(scope="module", params=MODELS)
def runs(
    request: pytest.FixtureRequest, run_engine: RunEngine, hybrid_checkpoint: HybridCheckpoint
) -> ComparedRuns:
    model = MODELS[request.param]
    if request.param in ("gpt-oss", "lfm2") and needs_tensor_shards.args[0]:
        pytest.skip("vLLM 0.30 does not run this model in float32 on a CPU")
    common = {"checkpoint": str(hybrid_checkpoint(request.param)), **model.options}
    return ComparedRuns(
        model,
        run_engine(
            (*COMPARED, several_groups.loads_without_one_piece, one_engine.final_state),
            blocks=model.blocks,
            l1=model.l1,
            **common,
        ),
        run_engine(COMPARED, blocks=LARGE, **common),
    )


@pytest.mark.parametrize("scenario", several_groups.EQUAL, ids=lambda scenario: scenario.__name__)
def test_completions_and_hits_equal_those_of_a_large_cache(
    runs: ComparedRuns, scenario: Scenario
) -> None:
    runs.kvcache.result_of(startup)
    assert_equal(
        runs.kvcache.result_of(scenario),
        runs.reference.result_of(scenario),
        runs.model.tolerance,
    )


@pytest.mark.parametrize("name", ["gemma-3", "qwen3.5"])
def test_completions_with_async_copies_equal_those_of_a_large_cache(
    name: str, run_engine: RunEngine, hybrid_checkpoint: HybridCheckpoint
) -> None:
    """With asynchronous copies, as on a GPU, stores and loads take several steps."""
    model = MODELS[name]
    common = {"checkpoint": str(hybrid_checkpoint(name)), **model.options}
    scenarios = (several_groups.users_and_turns, several_groups.requests_of_one_step)
    kvcache = run_engine(
        (async_copies.use_async_copies, *scenarios, one_engine.final_state),
        blocks=model.blocks,
        l1=model.l1,
        **common,
    )
    reference = run_engine(scenarios, blocks=LARGE, **common)
    for scenario in scenarios:
        assert_equal(kvcache.result_of(scenario), reference.result_of(scenario), model.tolerance)
    assert not any(kvcache.result_of(one_engine.final_state).values())


def test_aborts_at_every_moment_leave_no_open_state_and_right_blocks(runs: ComparedRuns) -> None:
    facts = runs.kvcache.result_of(several_groups.aborts_at_every_moment)
    reference = runs.reference.result_of(several_groups.aborts_at_every_moment)["answers"]
    assert_close(facts["answers"], reference, runs.model.tolerance)
    assert all(answer["cached"] >= 2 * several_groups.ALIGNMENT for answer in facts["answers"][1:])
    assert_no_open_state(facts)


def test_resets_at_every_moment_leave_no_open_state_and_right_blocks(runs: ComparedRuns) -> None:
    facts = runs.kvcache.result_of(several_groups.resets_at_every_moment)
    reference = runs.reference.result_of(several_groups.resets_at_every_moment)["answers"]
    assert_close(facts["answers"], reference, runs.model.tolerance)
    assert facts["used"][0] == 0  # the request went on, with blocks from before the reset
    assert all(facts["used"][1:])
    assert_no_open_state(facts)


def test_preempted_requests_resume_with_close_completions(runs: ComparedRuns) -> None:
    facts = runs.kvcache.result_of(several_groups.preempted_requests)
    reference = runs.reference.result_of(several_groups.preempted_requests)
    assert facts["preemptions"] > reference["preemptions"] == 0
    pairs = list(zip(facts["answers"], reference["answers"], strict=True))
    for number, (answer, right) in enumerate(pairs):
        before = pairs[number - len(pairs) // 2] if number >= len(pairs) // 2 else None
        if before is None or before[0]["tokens"] == before[1]["tokens"]:  # the same prompt
            assert_close([answer], [right], runs.model.tolerance)
    assert_no_open_state(facts)


def test_l1_smaller_than_the_traffic_stays_within_capacity(runs: ComparedRuns) -> None:
    facts = runs.kvcache.result_of(several_groups.more_chats_than_l1_holds)
    reference = runs.reference.result_of(several_groups.more_chats_than_l1_holds)["answers"]
    assert_close(facts["answers"], reference, runs.model.tolerance)
    assert facts["most"] <= facts["capacity"]
    assert facts["evicted_blocks"] > 0
    assert facts["hit_blocks"] > 0
    assert facts["stored_blocks"] - facts["evicted_blocks"] == facts["used"]
    assert facts["failed_blocks"] == 0
    assert_no_open_state(facts)


def test_failed_load_is_recomputed_and_then_found(runs: ComparedRuns) -> None:
    facts = runs.kvcache.result_of(several_groups.failed_load, warned=True)
    reference = runs.reference.result_of(several_groups.failed_load)["answers"]
    assert facts["loads"] >= 1
    assert_close(facts["answers"], reference, runs.model.tolerance)
    assert facts["answers"][-1]["cached"] >= reference[-1]["cached"]
    assert_no_open_state(facts)


def test_failed_store_changes_no_completion(runs: ComparedRuns) -> None:
    facts = runs.kvcache.result_of(several_groups.failed_store, warned=True)
    reference = runs.reference.result_of(several_groups.failed_store)["answers"]
    assert facts["stores"] > 1
    assert_close(facts["answers"], reference, runs.model.tolerance)
    assert facts["answers"][-1]["cached"] >= reference[-1]["cached"]
    assert_no_open_state(facts)


def test_load_that_leaves_out_one_piece_changes_the_completion(runs: ComparedRuns) -> None:
    facts = runs.kvcache.result_of(several_groups.loads_without_one_piece)
    assert facts["without"]
    for piece, answer in facts["without"].items():
        assert answer["cached"] == facts["right"]["cached"] > 0
        assert answer["logprobs"] != facts["right"]["logprobs"], f"piece {piece}"


def test_all_scenarios_leave_no_open_state(runs: ComparedRuns) -> None:
    assert not any(runs.kvcache.result_of(one_engine.final_state).values())
