"""Scenarios for models with several KV cache groups: on an engine with kvcache and on a reference.

The reference has no kvcache and a cache of its own that keeps everything. With kvcache, the memory
of vLLM's own cache is overwritten between completions, so every hit comes from kvcache, and a block
that it does not load changes the completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.engine.engine import BLOCK, Completion, Engine, prompt
from tests.support.engine.lower_tier import PROMPTS
from tests.support.engine.process import Scenario

ALIGNMENT = 3 * BLOCK  # tokens; vLLM makes blocks of models with large states as long

# Scenarios with equal completions: both engines compute the same tokens in the same steps


def users_and_turns(engine: Engine) -> list[Completion]:
    """Three users take three turns each after one system prompt; openings take two steps."""
    engine.reset_all_caches()
    system = prompt("system", 200)
    histories = {user: system + prompt(f"{user} opens", 90) for user in ("a", "b", "c")}
    answers = []
    for turn in range(3):
        for user, history in histories.items():
            answers.append(engine.complete(history, tokens=24))
            engine.overwrite_own_cache()
            histories[user] = history + answers[-1]["tokens"] + prompt(f"{user} {turn}", 70)
    return answers


def turn_after_a_long_answer(engine: Engine) -> list[Completion]:
    """The second turn needs blocks that were computed while decoding."""
    engine.reset_all_caches()
    opening = prompt("opening", 40)
    first = engine.complete(opening, tokens=170)
    engine.overwrite_own_cache()
    return [first, engine.complete(opening + first["tokens"] + prompt("goes on", 10))]


def prompts_of_several_steps(engine: Engine) -> list[Completion]:
    """Three prompts, each the next one's prefix; the rest after a hit takes several steps too."""
    engine.reset_all_caches()
    longest = prompt("long", 909)
    answers = []
    for length in (300, 900, 909):
        answers.append(engine.complete(longest[:length]))
        engine.overwrite_own_cache()
    return answers


def prompt_of_whole_blocks(engine: Engine) -> list[Completion]:
    """A prompt that ends with a block, three times."""
    engine.reset_all_caches()
    asked = prompt("whole", 4 * ALIGNMENT)
    answers = []
    for _ in range(3):
        answers.append(engine.complete(asked, tokens=2))
        engine.overwrite_own_cache()
    return answers


def requests_of_one_step(engine: Engine) -> list[Completion]:
    """Three requests in one step share a prefix: at first no cache holds it, then all do."""
    engine.reset_all_caches()
    prefix = prompt("shared", ALIGNMENT)
    prompts = [prefix + prompt(f"own {number}", 40) for number in range(2)]
    answers = engine.complete_all(prompts)
    engine.overwrite_own_cache()
    return answers + engine.complete_all([asked + prompt("more", 5) for asked in prompts])


def hit_after_own_blocks(engine: Engine) -> list[Completion]:
    """vLLM's own cache has the first blocks of a prompt, and L1 has more."""
    engine.reset_all_caches()
    known = prompt("known", 4 * ALIGNMENT)
    answers = [engine.complete(known)]
    engine.overwrite_own_cache()
    answers.append(engine.complete(known[: engine.settings.budget + 5]))
    answers.append(engine.complete(known + prompt("unknown", 20)))
    return answers


def salted_prompts(engine: Engine) -> list[Completion]:
    """One prompt under two salts and without one; then under the first salt again."""
    engine.reset_all_caches()
    asked = prompt("salted", ALIGNMENT + 4)
    answers = []
    for salt in ("a", "b", None, "a"):
        answers.append(engine.complete(asked, tokens=4, salt=salt))
        engine.overwrite_own_cache()
    return answers


EQUAL: tuple[Scenario, ...] = (
    users_and_turns, turn_after_a_long_answer, prompts_of_several_steps, prompt_of_whole_blocks,
    requests_of_one_step, hit_after_own_blocks, salted_prompts,
)  # fmt: skip

# Scenarios with close completions: the engines compute the same tokens in other steps


def aborts_at_every_moment(engine: Engine) -> dict[str, Any]:
    """Abort a request with a hit after 0, 1, ... steps while another decodes; then complete it.

    It waits, loads, computes its prompt in several steps, and decodes. The reference aborts none.
    """
    engine.reset_all_caches()
    known = prompt("known to all", 2 * ALIGNMENT + 9)
    answers, ends = [engine.complete(known)], []
    for steps in range(7):
        engine.overwrite_own_cache()
        asked = known + prompt(f"aborted after {steps}", 300)
        if engine.has_kvcache:
            engine.add("decodes", prompt("decodes", 40), tokens=12)
            engine.step()
            engine.add("goes", asked, tokens=20)
            for _ in range(steps):
                engine.step()
            engine.abort("goes")
            engine.drain()
            ends.append(engine.open_state())
            engine.overwrite_own_cache()
        answers.append(engine.complete(asked, tokens=4))
    return {"answers": answers, "ends": ends}


def resets_at_every_moment(engine: Engine) -> dict[str, Any]:
    """Reset all caches 1, 2, ... steps after a request with a hit was added; then repeat it.

    In the first step it loads: vLLM goes on with it, and kvcache stores nothing of it. Later, vLLM
    starts it again. The reference resets nothing.
    """
    engine.reset_all_caches()
    known = prompt("known until the reset", 2 * ALIGNMENT + 9)
    answers, ends, used = [], [], []
    for steps in range(1, 6):
        answers.append(engine.complete(known, tokens=1))
        engine.overwrite_own_cache()
        asked = known + prompt(f"reset after {steps}", 300)
        if engine.has_kvcache:
            engine.add("is reset", asked, tokens=6)
            for _ in range(steps):
                engine.step()
            restarts = steps > 1
            reset = engine.llm.reset_prefix_cache
            assert reset(reset_running_requests=restarts, reset_connector=True) == restarts
            answers += engine.drain().values()
            ends.append(engine.open_state())
            used.append(engine.l1_stats.used_blocks)
            engine.overwrite_own_cache()
        else:
            answers.append(engine.complete(asked, tokens=6))
        answers.append(engine.complete(asked, tokens=6))
        engine.overwrite_own_cache()
    return {"answers": answers, "ends": ends, "used": used}


def preempted_requests(engine: Engine) -> dict[str, Any]:
    """Concurrent requests grow until they do not fit; then each has a next turn."""
    engine.reset_all_caches()
    before = engine.metric("vllm:num_preemptions")
    prompts = [prompt(f"grows {n}", 60 + 17 * n) for n in range(6)]
    answers = engine.complete_all(prompts, tokens=150)
    preemptions = engine.metric("vllm:num_preemptions") - before
    for asked, answer in zip(prompts, answers[:6], strict=True):
        engine.overwrite_own_cache()
        answers.append(engine.complete(asked + answer["tokens"] + [1, 2, 3]))
    facts = {"answers": answers, "preemptions": preemptions}
    return facts | {"ends": [engine.open_state()]} if engine.has_kvcache else facts


def more_chats_than_l1_holds(engine: Engine) -> dict[str, Any]:
    """Twelve chats of three turns; return the counts of L1 too."""
    engine.reset_all_caches()
    before = engine.l1_stats if engine.has_kvcache else None
    histories = [prompt(f"chat {n}", 150) for n in range(12)]
    answers, used = [], 0
    for turn in range(3):
        for n, history in enumerate(histories):
            answers.append(engine.complete(history, tokens=4))
            engine.overwrite_own_cache()
            histories[n] = history + answers[-1]["tokens"] + prompt(f"{n} {turn}", 70)
            used = max(used, engine.l1_stats.used_blocks) if engine.has_kvcache else 0
    facts: dict[str, Any] = {"answers": answers}
    if before is not None:
        after = engine.l1_stats
        names = ("stored_blocks", "evicted_blocks", "dropped_blocks", "failed_blocks", "hit_blocks")
        facts |= {name: getattr(after, name) - getattr(before, name) for name in names}
        facts |= {"most": used, "used": after.used_blocks, "capacity": after.capacity_blocks}
        facts["ends"] = [engine.open_state()]
    return facts


CLOSE: tuple[Scenario, ...] = (
    aborts_at_every_moment, resets_at_every_moment, preempted_requests, more_chats_than_l1_holds,
)  # fmt: skip

# Scenarios for engines with kvcache and a lower tier, or with copies that fail


def repeat_prompts(engine: Engine) -> list[Completion]:
    """Complete the prompts of `lower_tier.complete_prompts`."""
    answers = []
    for asked in PROMPTS:
        engine.overwrite_own_cache()
        answers.append(engine.complete(asked, tokens=12))
    return answers


def failed_load(engine: Engine) -> dict[str, Any]:
    """The load of a hit fails while another request decodes; then the prompt is repeated.

    On the reference no load fails.
    """
    engine.reset_all_caches()
    known = prompt("fails to load", 2 * ALIGNMENT + 9)
    asked = known + prompt("beyond", 70)
    answers = [engine.complete(known, tokens=2)]
    engine.overwrite_own_cache()
    if not engine.has_kvcache:
        return {"answers": answers + [engine.complete(asked) for _ in range(2)]}
    engine.add("decodes", prompt("decodes", 40), tokens=12)
    engine.step()
    with engine.failing_copies("scatter") as calls:
        engine.add("fails", asked)
        answers.append(engine.drain()["fails"])
    engine.overwrite_own_cache()
    answers.append(engine.complete(asked))
    return {"answers": answers, "loads": len(calls), "ends": [engine.open_state()]}


def failed_store(engine: Engine) -> dict[str, Any]:
    """The first store of a prompt fails; then the prompt is repeated twice."""
    engine.reset_all_caches()
    asked = prompt("fails to store", 3 * ALIGNMENT + 9)
    if not engine.has_kvcache:
        return {"answers": [engine.complete(asked) for _ in range(3)]}
    with engine.failing_copies("gather") as calls:
        answers = [engine.complete(asked)]
    for _ in range(2):
        engine.overwrite_own_cache()
        answers.append(engine.complete(asked))
    return {"answers": answers, "stores": len(calls), "ends": [engine.open_state()]}


def loads_without_one_piece(engine: Engine) -> dict[str, Any]:
    """Complete a prompt after a load of all it needs, and after loads that leave out one piece.

    It has one token more than the hit: a convolution forgets its state after a few tokens.
    """
    engine.reset_all_caches()
    known = prompt("without one piece", 2 * ALIGNMENT)
    asked = [*known, 7]
    engine.complete(known, tokens=1)
    engine.complete(asked, tokens=1)
    engine.overwrite_own_cache()
    with _without_piece(engine, None) as pieces:
        right = engine.complete(asked, tokens=4)
    answers = {}
    for piece in sorted(pieces):
        engine.overwrite_own_cache()
        with _without_piece(engine, piece):
            answers[str(piece)] = engine.complete(asked, tokens=4)
    return {"right": right, "without": answers}


@contextmanager
def _without_piece(engine: Engine, left_out: int | None) -> Iterator[set[int]]:
    """Leave one piece out of all loads. Yields the numbers of all pieces to load."""
    copier = engine.worker_side.copier
    scatter, seen = copier.scatter, set[int]()

    def scatter_others(
        slots: list[int], blocks: list[int], geometries: list[tuple[int, int]], **options: Any
    ) -> Any:
        rows = [piece for piece, count in geometries for _ in range(count)]
        seen.update(rows)
        kept = [row for row, piece in enumerate(rows) if piece != left_out]
        return scatter(
            [slots[row] for row in kept],
            [blocks[row] for row in kept],
            [(rows[row], 1) for row in kept],
            **options,
        )

    copier.scatter = scatter_others
    try:
        yield seen
    finally:
        del copier.scatter
