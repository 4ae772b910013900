"""A tiny engine with kvcache: its answers are those of a large one, and no end is left open."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine import async_copies, fork, one_engine, two_engines
from tests.support.engine.engine import BLOCK
from tests.support.engine.process import EAGER, Act, Play, starts

pytestmark = pytest.mark.engine

TINY, LARGE = 40, 1000  # blocks; the longest prompt takes 32
NOTHING = {"promised": 0, "running": 0, "jobs": 0, "loads": 0, "pinned": 0}


@pytest.fixture(scope="module")
def kept(stage: Stage) -> Play:
    return stage((*two_engines.SAME, fork.forked, *one_engine.ACTS), blocks=TINY, l1="64MiB")


@pytest.fixture(scope="module")
def dawdling(stage: Stage) -> Play:
    """The same where copies go on beside later steps, as on a GPU."""
    acts_of_it = (
        async_copies.copy_beside, *two_engines.SAME, one_engine.pages,
        async_copies.by_layer, async_copies.unasked, async_copies.late, async_copies.locked,
    )  # fmt: skip
    return stage(acts_of_it, blocks=TINY, l1="64MiB")


@pytest.fixture(scope="module")
def later(stage: Stage) -> Play:
    """The same where every load is one that the step does not await."""
    acts_of_it = (
        async_copies.copy_beside, async_copies.load_later, *two_engines.SAME,
        async_copies.later, async_copies.later_fails, one_engine.ends,
    )  # fmt: skip
    return stage(acts_of_it, blocks=TINY, l1="64MiB")


def by_layer(stage: Stage, *more: Act, **options: object) -> Play:
    acts_of_it = (
        async_copies.copy_beside,
        async_copies.by_layer,
        one_engine.pages,
        *more,
        one_engine.ends,
    )
    eager = "1" if options.get("enforce_eager", True) else ""
    environment = {EAGER: eager}
    return stage(acts_of_it, blocks=TINY, l1="64MiB", options=options, environment=environment)


@pytest.fixture(scope="module")
def drafting(stage: Stage) -> Play:
    """With a drafter vLLM reports a step before it has the step's stores begun."""
    drafter = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    more = (one_engine.failed_load_asked_for_again, one_engine.failed_load_of_two)
    return by_layer(stage, *more, speculative_config=drafter)


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage(two_engines.SAME, blocks=LARGE)


def test_it_starts_without_a_warning(kept: Play) -> None:
    kept.of(starts)


@pytest.mark.parametrize("act", two_engines.SAME, ids=lambda act: act.__name__)
def test_answers_and_hits_are_those_of_a_cache_that_keeps_all(
    kept: Play, reference: Play, act: Act
) -> None:
    assert kept.of(act) == reference.of(act)


@pytest.mark.parametrize("act", two_engines.SAME, ids=lambda act: act.__name__)
@pytest.mark.parametrize("engine", ["dawdling", "later"])
def test_copies_that_go_on_beside_steps_change_nothing(
    engine: str, reference: Play, act: Act, request: pytest.FixtureRequest
) -> None:
    right = reference.of(act)
    if (engine, act) == (
        "later",
        two_engines.whole_blocks,
    ):  # the first is computed, the others wait
        right = [right[0], *({**answer, "cached": 4 * BLOCK} for answer in right[1:])]
    assert request.getfixturevalue(engine).of(act) == right


def test_a_load_that_is_not_awaited_holds_nobody_up(later: Play) -> None:
    facts = later.of(async_copies.later)
    assert facts["before"] >= 3  # tokens of the other
    assert facts["loading"] == 1
    assert facts["again"] == [facts["right"], 6 * BLOCK]
    assert facts["ends"] == NOTHING


def test_a_load_that_is_not_awaited_and_fails_is_computed(later: Play) -> None:
    facts = later.of(async_copies.later_fails, warned=True)
    assert facts["loads"] == [6]
    assert facts["tokens"] == 2 * [facts["right"]]
    assert facts["cached"] == 6 * BLOCK
    assert later.of(one_engine.ends) == facts["ends"] == NOTHING


def test_a_job_ends_when_its_last_page_is_there(dawdling: Play) -> None:
    facts = dawdling.of(async_copies.late)
    assert facts["going"] == NOTHING | {"jobs": 1, "pinned": 6}
    assert facts["drained"] == NOTHING


EACH_WHEN_IT_IS_ASKED_FOR = [[0, 1], [1, 2], [2, 3], [3, 4]]
ALL_BEFORE = 4 * [[1, 1]]  # in one call


def test_layers_are_awaited_when_they_are_asked_for(dawdling: Play) -> None:
    assert dawdling.of(async_copies.by_layer) == 2 * [EACH_WHEN_IT_IS_ASKED_FOR]


def test_what_a_pass_read_without_asking_is_computed_again(dawdling: Play) -> None:
    facts = dawdling.of(async_copies.unasked, warned=True)
    assert facts["answered"] == facts["computed"]
    assert facts["tokens"] == 3 * facts["tokens"][:1]
    assert facts["ends"] == NOTHING
    [said] = dawdling.warnings(async_copies.unasked)
    assert "read 1 layers without waiting for them" in said


def test_a_compiled_model_asks_for_its_layers(stage: Stage) -> None:
    play = by_layer(stage, enforce_eager=False, compilation_config={"backend": "eager"})
    assert play.of(async_copies.by_layer) == 2 * [EACH_WHEN_IT_IS_ASKED_FOR]
    pages = play.of(one_engine.pages)
    assert pages["restored"] == pages["computed"] != pages["overwritten"]
    assert play.of(one_engine.ends) == NOTHING


def test_with_a_drafter_all_is_there_before_the_forward_pass(drafting: Play) -> None:
    assert drafting.of(async_copies.by_layer) == 2 * [ALL_BEFORE]


def test_with_a_drafter_what_a_failed_load_spoiled_is_not_published(drafting: Play) -> None:
    facts = drafting.of(one_engine.failed_load_asked_for_again, warned=True)
    assert facts["loads"] == [4]
    assert facts["tokens"] == 3 * [facts["cold"]]
    assert facts["cached"] == 6 * BLOCK
    two = drafting.of(one_engine.failed_load_of_two, warned=True)
    assert two["tokens"] == two["again"] == two["right"]
    assert drafting.of(one_engine.ends) == facts["ends"] == two["ends"] == NOTHING


def test_l1_is_locked_for_the_device(dawdling: Play) -> None:
    found = dawdling.of(async_copies.locked)
    assert found["locked"] == found["slab"] > 0
    assert found["in the end"] == 0


def test_later_turns_are_found_whole(kept: Play) -> None:
    answers = kept.of(two_engines.chats)
    assert [answer["cached"] for answer in answers[4:8]] == [9 * BLOCK] * 4  # of 290 + 23 tokens
    # 40 + 100 tokens; the KV of the last is never computed.
    assert kept.of(two_engines.generated)[1]["cached"] == 4 * BLOCK


def test_a_hit_leaves_a_token_to_compute(kept: Play) -> None:
    assert [answer["cached"] for answer in kept.of(two_engines.whole_blocks)] == [
        0,
        3 * BLOCK,
        3 * BLOCK,
    ]


@pytest.mark.parametrize("engine", ["kept", "dawdling"])
def test_restored_pages_are_those_computed(engine: str, request: pytest.FixtureRequest) -> None:
    pages = request.getfixturevalue(engine).of(one_engine.pages)
    assert len(pages["computed"]) == 4
    for layer in range(4):
        for block in range(6):
            assert pages["overwritten"][layer][block] != pages["computed"][layer][block]
    assert pages["restored"] == pages["computed"]


def test_a_corrupted_slot_changes_the_answer(kept: Play) -> None:
    answers = kept.of(one_engine.corrupted)
    assert answers["wrong"]["cached"] == answers["right"]["cached"] == 3 * BLOCK
    assert answers["wrong"]["logprobs"] != answers["right"]["logprobs"]


def test_salts_do_not_share(kept: Play) -> None:
    assert kept.of(one_engine.salted) == {"a": 0, "b": 0, "none": 0, "a again": 3 * BLOCK}


def test_hits_show_in_the_engines_metrics(kept: Play) -> None:
    assert kept.of(one_engine.external_hits) == {
        "cached": 5 * BLOCK,
        "hits": 3 * BLOCK,
        "queries": 3 * BLOCK + 3,
        "hit_blocks": 3,
    }


def test_abort_before_any_step(kept: Play) -> None:
    assert kept.of(one_engine.abort_before_any_step) == NOTHING


def test_abort_with_a_promise(kept: Play) -> None:
    facts = kept.of(one_engine.abort_with_a_promise)
    assert facts["waiting"] == NOTHING | {"promised": 1, "running": 1, "pinned": 12}
    assert facts["aborted"] == NOTHING | {"running": 1}
    assert facts["drained"] == NOTHING


def test_abort_after_load(kept: Play) -> None:
    assert kept.of(one_engine.abort_after_load) == {"loaded": 5 * BLOCK, "drained": NOTHING}


def test_abort_between_chunks(kept: Play) -> None:
    facts = kept.of(one_engine.abort_between_chunks)
    assert facts == {"done": 256, "used": 8, "drained": NOTHING}


def test_abort_while_decoding(kept: Play) -> None:
    # 60 steps have computed 99 tokens.
    assert kept.of(one_engine.abort_while_decoding) == {"used": 3, "drained": NOTHING}


def test_abort_of_the_one_that_computed_for_two(kept: Play) -> None:
    facts = kept.of(one_engine.abort_one_of_two)
    assert facts["again"] == facts["first"]
    assert facts["drained"] == NOTHING


def test_reset_forgets_everything(kept: Play) -> None:
    assert kept.of(one_engine.reset_idle) == {"used": 3, "after": 0, "cached": 0}


def test_reset_of_the_engine_alone_leaves_l1(kept: Play) -> None:
    assert kept.of(one_engine.reset_without_the_connector) == 3 * BLOCK


def test_reset_under_a_running_request(kept: Play) -> None:
    assert kept.of(one_engine.reset_under_a_running_request) == {
        "reset": False, "used then": 0, "used": 0, "later": 0, "cached": 0, "ends": NOTHING,
    }  # fmt: skip


def test_reset_ends_a_promise(kept: Play) -> None:
    facts = kept.of(one_engine.reset_with_a_promise)
    assert facts["waiting"]["pinned"] == 11
    assert facts["reset"] == NOTHING | {"running": 1}  # goes on, and is not kept
    assert facts["drained"] == NOTHING
    assert facts["cached"] == 0
    assert facts["same"]


def test_failed_load_is_computed_again(kept: Play) -> None:
    facts = kept.of(one_engine.failed_load, warned=True)
    assert facts["loads"] == [4]
    # Nothing that the step computed is to be trusted.
    assert facts["step"] == {"dropped": 4, "stored": 0, "held": [False] * 6, "pinned": 0}
    assert facts["answer"]["tokens"] == facts["cold"]["tokens"]
    assert facts["answer"]["logprobs"] == facts["cold"]["logprobs"]
    assert facts["held"] == [True] * 6
    assert facts["ends"] == NOTHING


def test_failed_load_leaves_the_prefix_to_be_kept_again(kept: Play) -> None:
    facts = kept.of(one_engine.failed_load_of_all_it_has, warned=True)
    assert facts == {"held": [True] * 4, "ends": NOTHING}


def test_failed_load_of_blocks_that_two_share(kept: Play) -> None:
    facts = kept.of(one_engine.failed_load_of_two, warned=True)
    assert facts["tokens"] == facts["again"] == facts["right"]
    assert facts["ends"] == NOTHING


def test_blocks_that_were_not_loaded_are_not_found_by_others(kept: Play) -> None:
    facts = kept.of(one_engine.abort_after_a_failed_load, warned=True)
    assert facts["answers"] == [facts["right"]] * 3  # two from its own cache, one from L1
    assert facts["ends"] == NOTHING


def test_failed_store_is_offered_again(kept: Play) -> None:
    facts = kept.of(one_engine.failed_store, warned=True)
    assert facts["step"] == {"failed": 4, "stored": 0, "held": [False] * 4, "pinned": 0}
    assert facts["held"] == [True] * 4
    assert facts["cached"] == 4 * BLOCK
    assert facts["ends"] == NOTHING


def test_fork_of_the_engine_is_refused_and_changes_no_answer(kept: Play) -> None:
    facts = kept.of(fork.forked)
    assert facts["refused"]
    assert facts["again"]["tokens"] == facts["right"]["tokens"]
    assert facts["again"]["cached"] == 6 * BLOCK
    assert facts["ends"] == NOTHING


def test_no_end_is_open_after_all(kept: Play) -> None:
    assert kept.of(one_engine.ends) == NOTHING
