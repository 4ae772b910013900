"""An engine with a tiny cache and kvcache completes prompts as one with a large cache does."""

from __future__ import annotations

from importlib import metadata

import pytest

from tests.e2e.conftest import RunEngine
from tests.support.engine import async_copies, fork, one_engine, sleep, two_engines
from tests.support.engine.engine import BLOCK
from tests.support.engine.process import EAGER, EngineRun, Scenario, startup

pytestmark = pytest.mark.engine

TINY, LARGE = 40, 1000  # blocks; the longest prompt takes 32
NO_OPEN_STATE = {"promised": 0, "running": 0, "jobs": 0, "loads": 0, "pinned": 0}


@pytest.fixture(scope="module")
def synchronous(run_engine: RunEngine) -> EngineRun:
    return run_engine(
        (
            *two_engines.SCENARIOS,
            fork.fork_of_the_engine,
            sleep.sleep_and_wake_up,
            *one_engine.SCENARIOS,
        ),
        blocks=TINY,
        l1="64MiB",
    )


@pytest.fixture(scope="module")
def asynchronous(run_engine: RunEngine) -> EngineRun:
    """With asynchronous copies, as on a GPU."""
    scenarios = (
        async_copies.use_async_copies, *two_engines.SCENARIOS, one_engine.restored_pages,
        async_copies.layers_at_each_wait, async_copies.pass_that_skips_a_wait,
        async_copies.job_that_outlives_its_step,
    )  # fmt: skip
    return run_engine(scenarios, blocks=TINY, l1="64MiB")


@pytest.fixture(scope="module")
def deferred(run_engine: RunEngine) -> EngineRun:
    """With asynchronous copies, and every load deferred."""
    scenarios = (
        async_copies.use_async_copies, async_copies.defer_all_loads, *two_engines.SCENARIOS,
        async_copies.deferred_load, async_copies.deferred_load_that_fails, one_engine.final_state,
    )  # fmt: skip
    return run_engine(scenarios, blocks=TINY, l1="64MiB")


def run_with_layer_waits(run_engine: RunEngine, *more: Scenario, **options: object) -> EngineRun:
    scenarios = (
        async_copies.use_async_copies,
        async_copies.layers_at_each_wait,
        one_engine.restored_pages,
        *more,
        one_engine.final_state,
    )
    eager = "1" if options.get("enforce_eager", True) else ""
    environment = {EAGER: eager}
    return run_engine(scenarios, blocks=TINY, l1="64MiB", options=options, environment=environment)


@pytest.fixture(scope="module")
def with_drafter(run_engine: RunEngine) -> EngineRun:
    """With a drafter, vLLM reports a step before it starts the step's stores."""
    if metadata.version("vllm").startswith("0.30."):
        pytest.skip("vLLM 0.30 checks no drafted tokens on a CPU: its sampler needs Triton")
    drafter = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    more = (one_engine.failed_load_asked_for_again, one_engine.failed_load_of_two)
    return run_with_layer_waits(run_engine, *more, speculative_config=drafter)


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine) -> EngineRun:
    return run_engine(two_engines.SCENARIOS, blocks=LARGE)


def test_start_logs_no_warning(synchronous: EngineRun) -> None:
    synchronous.result_of(startup)


@pytest.mark.parametrize("scenario", two_engines.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_completions_with_synchronous_copies_equal_those_of_a_large_cache(
    synchronous: EngineRun, reference: EngineRun, scenario: Scenario
) -> None:
    assert synchronous.result_of(scenario) == reference.result_of(scenario)


@pytest.mark.parametrize("scenario", two_engines.SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("engine", ["asynchronous", "deferred"])
def test_completions_with_asynchronous_copies_equal_those_of_a_large_cache(
    engine: str, reference: EngineRun, scenario: Scenario, request: pytest.FixtureRequest
) -> None:
    right = reference.result_of(scenario)
    # A deferred load may hit the whole prompt: vLLM recomputes its last token only.
    if (engine, scenario) == ("deferred", two_engines.whole_blocks):
        right = [right[0], *({**answer, "cached": 4 * BLOCK} for answer in right[1:])]
    assert request.getfixturevalue(engine).result_of(scenario) == right


def test_deferred_load_does_not_delay_other_requests(deferred: EngineRun) -> None:
    facts = deferred.result_of(async_copies.deferred_load)
    assert facts["before"] >= 3  # tokens of the other
    assert facts["loading"] == 1
    assert facts["again"] == [facts["right"], 6 * BLOCK]
    assert facts["ends"] == NO_OPEN_STATE


def test_deferred_load_that_fails_is_recomputed(deferred: EngineRun) -> None:
    facts = deferred.result_of(async_copies.deferred_load_that_fails, warned=True)
    assert facts["loads"] == [6]
    assert facts["tokens"] == 2 * [facts["right"]]
    assert facts["cached"] == 6 * BLOCK
    assert deferred.result_of(one_engine.final_state) == facts["ends"] == NO_OPEN_STATE


def test_job_ends_with_its_last_page(asynchronous: EngineRun) -> None:
    facts = asynchronous.result_of(async_copies.job_that_outlives_its_step)
    assert facts["going"] == NO_OPEN_STATE | {"jobs": 1, "pinned": 6}
    assert facts["drained"] == NO_OPEN_STATE


EACH_AT_ITS_WAIT = [[0, 1], [1, 2], [2, 3], [3, 4]]
ALL_BEFORE_THE_FIRST_WAIT = 4 * [[1, 1]]  # in one call


def test_forward_pass_waits_for_each_layer_at_its_turn(asynchronous: EngineRun) -> None:
    assert asynchronous.result_of(async_copies.layers_at_each_wait) == 2 * [EACH_AT_ITS_WAIT]


def test_layer_read_without_a_wait_is_recomputed(asynchronous: EngineRun) -> None:
    facts = asynchronous.result_of(async_copies.pass_that_skips_a_wait, warned=True)
    assert facts["answered"] == facts["computed"]
    assert facts["tokens"] == 3 * facts["tokens"][:1]
    assert facts["ends"] == NO_OPEN_STATE
    [warning] = asynchronous.warnings_of(async_copies.pass_that_skips_a_wait)
    assert "read 1 layers without waiting for them" in warning


def test_forward_pass_of_a_compiled_model_waits_for_each_layer(run_engine: RunEngine) -> None:
    run = run_with_layer_waits(
        run_engine, enforce_eager=False, compilation_config={"backend": "eager"}
    )
    assert run.result_of(async_copies.layers_at_each_wait) == 2 * [EACH_AT_ITS_WAIT]
    pages = run.result_of(one_engine.restored_pages)
    assert pages["restored"] == pages["computed"] != pages["overwritten"]
    assert run.result_of(one_engine.final_state) == NO_OPEN_STATE


def test_drafter_makes_all_layers_load_before_the_forward_pass(with_drafter: EngineRun) -> None:
    assert with_drafter.result_of(async_copies.layers_at_each_wait) == 2 * [
        ALL_BEFORE_THE_FIRST_WAIT
    ]


def test_failed_load_with_a_drafter_publishes_no_block_after_it(with_drafter: EngineRun) -> None:
    facts = with_drafter.result_of(one_engine.failed_load_asked_for_again, warned=True)
    assert facts["loads"] == [4]
    assert facts["tokens"] == 3 * [facts["cold"]]
    assert facts["cached"] == 6 * BLOCK
    two = with_drafter.result_of(one_engine.failed_load_of_two, warned=True)
    assert two["tokens"] == two["again"] == two["right"]
    assert (
        with_drafter.result_of(one_engine.final_state)
        == facts["ends"]
        == two["ends"]
        == NO_OPEN_STATE
    )


def test_later_turns_hit_all_full_blocks(synchronous: EngineRun) -> None:
    answers = synchronous.result_of(two_engines.chats)
    assert [answer["cached"] for answer in answers[4:8]] == [9 * BLOCK] * 4  # of 290 + 23 tokens
    # 40 + 100 tokens; the KV of the last is never computed.
    assert synchronous.result_of(two_engines.generated_blocks)[1]["cached"] == 4 * BLOCK


def test_hit_of_whole_blocks_leaves_a_token_to_compute(synchronous: EngineRun) -> None:
    assert [answer["cached"] for answer in synchronous.result_of(two_engines.whole_blocks)] == [
        0,
        3 * BLOCK,
        3 * BLOCK,
    ]


@pytest.mark.parametrize("engine", ["synchronous", "asynchronous"])
def test_restored_pages_equal_computed_pages(engine: str, request: pytest.FixtureRequest) -> None:
    pages = request.getfixturevalue(engine).result_of(one_engine.restored_pages)
    assert len(pages["computed"]) == 4
    for layer in range(4):
        for block in range(6):
            assert pages["overwritten"][layer][block] != pages["computed"][layer][block]
    assert pages["restored"] == pages["computed"]


def test_corrupted_slot_changes_the_completion(synchronous: EngineRun) -> None:
    answers = synchronous.result_of(one_engine.corrupted_slot)
    assert answers["wrong"]["cached"] == answers["right"]["cached"] == 3 * BLOCK
    assert answers["wrong"]["logprobs"] != answers["right"]["logprobs"]


def test_salts_share_no_blocks(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.salted_prompts) == {
        "a": 0,
        "b": 0,
        "none": 0,
        "a again": 3 * BLOCK,
    }


def test_hit_is_counted_by_vllm_and_by_l1(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.external_hits) == {
        "cached": 5 * BLOCK,
        "hits": 3 * BLOCK,
        "queries": 3 * BLOCK + 3,
        "hit_blocks": 3,
    }


def test_abort_before_any_step_leaves_no_open_state(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.abort_before_any_step) == NO_OPEN_STATE


def test_abort_of_a_waiting_request_unpins_its_hit(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(one_engine.abort_with_a_promise)
    assert facts["waiting"] == NO_OPEN_STATE | {"promised": 1, "running": 1, "pinned": 12}
    assert facts["aborted"] == NO_OPEN_STATE | {"running": 1}
    assert facts["drained"] == NO_OPEN_STATE


def test_abort_after_a_load_leaves_no_open_state(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.abort_after_load) == {
        "loaded": 5 * BLOCK,
        "drained": NO_OPEN_STATE,
    }


def test_abort_between_chunks_keeps_the_computed_blocks(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(one_engine.abort_between_chunks)
    assert facts == {"done": 256, "used": 8, "drained": NO_OPEN_STATE}


def test_abort_while_decoding_keeps_the_computed_blocks(synchronous: EngineRun) -> None:
    # 60 steps have computed 99 tokens.
    assert synchronous.result_of(one_engine.abort_while_decoding) == {
        "used": 3,
        "drained": NO_OPEN_STATE,
    }


def test_abort_of_the_request_that_computes_a_shared_prefix_keeps_the_other_right(
    synchronous: EngineRun,
) -> None:
    facts = synchronous.result_of(one_engine.abort_one_of_two)
    assert facts["again"] == facts["first"]
    assert facts["drained"] == NO_OPEN_STATE


def test_reset_of_an_idle_engine_empties_l1(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.reset_idle) == {"used": 3, "after": 0, "cached": 0}


def test_engine_that_wakes_up_finds_no_block_from_before_its_sleep(synchronous: EngineRun) -> None:
    assert synchronous.result_of(sleep.sleep_and_wake_up) == {
        "used asleep": 0, "keeps its stack": True, "tokens": 80, "equal": [True, True],
        "cached": [0, 3 * BLOCK], "ends": NO_OPEN_STATE,
    }  # fmt: skip


def test_reset_of_the_own_cache_leaves_l1(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.reset_without_the_connector) == 3 * BLOCK


def test_reset_under_a_running_request_stores_none_of_its_blocks(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.reset_under_a_running_request) == {
        "reset": False, "used after reset": 0, "used": 0, "later": 0,
        "cached": 0, "ends": NO_OPEN_STATE,
    }  # fmt: skip


def test_reset_unpins_the_hit_of_a_waiting_request(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(one_engine.reset_with_a_promise)
    assert facts["waiting"]["pinned"] == 11
    assert facts["reset"] == NO_OPEN_STATE | {"running": 1}  # it goes on and is not stored
    assert facts["drained"] == NO_OPEN_STATE
    assert facts["cached"] == 0
    assert facts["same"]


def test_failed_load_is_recomputed_and_then_stored(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(one_engine.failed_load, warned=True)
    assert facts["loads"] == [4]
    # Nothing that the step computed is to be trusted.
    assert facts["step"] == {"dropped": 4, "stored": 0, "held": [False] * 6, "pinned": 0}
    assert facts["answer"]["tokens"] == facts["cold"]["tokens"]
    assert facts["answer"]["logprobs"] == facts["cold"]["logprobs"]
    assert facts["held"] == [True] * 6
    assert facts["ends"] == NO_OPEN_STATE


def test_failed_load_of_a_whole_prompt_stores_its_prefix_again(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(one_engine.failed_load_of_all_it_has, warned=True)
    assert facts == {"held": [True] * 4, "ends": NO_OPEN_STATE}


def test_failed_load_of_shared_blocks_is_recomputed_for_both_requests(
    synchronous: EngineRun,
) -> None:
    facts = synchronous.result_of(one_engine.failed_load_of_two, warned=True)
    assert facts["tokens"] == facts["again"] == facts["right"]
    assert facts["ends"] == NO_OPEN_STATE


def test_abort_after_a_failed_load_leaves_no_wrong_block(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(one_engine.abort_after_a_failed_load, warned=True)
    assert facts["answers"] == [facts["right"]] * 3  # two from its own cache, one from L1
    assert facts["ends"] == NO_OPEN_STATE


def test_failed_store_is_repeated_by_the_next_step(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(one_engine.failed_store, warned=True)
    assert facts["step"] == {"failed": 4, "stored": 0, "held": [False] * 4, "pinned": 0}
    assert facts["held"] == [True] * 4
    assert facts["cached"] == 4 * BLOCK
    assert facts["ends"] == NO_OPEN_STATE


def test_fork_of_the_engine_cannot_write_to_l1(synchronous: EngineRun) -> None:
    facts = synchronous.result_of(fork.fork_of_the_engine)
    assert facts["refused"]
    assert facts["again"]["tokens"] == facts["right"]["tokens"]
    assert facts["again"]["cached"] == 6 * BLOCK
    assert facts["ends"] == NO_OPEN_STATE


def test_all_scenarios_leave_no_open_state(synchronous: EngineRun) -> None:
    assert synchronous.result_of(one_engine.final_state) == NO_OPEN_STATE
