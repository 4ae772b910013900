"""Scenarios for an engine with too few blocks of its own, or in L1, for the requests that run.

The number of blocks changes how vLLM batches requests, hence the shapes of its computations, hence
the last digits of logprobs. Run these in float32: there, such a difference selects no other token.
"""

from __future__ import annotations

from typing import Any

from tests.support.engine.engine import Engine, prompt


def preemption(engine: Engine) -> dict[str, Any]:
    """Four concurrent requests grow until they do not fit; then each has a next turn."""
    engine.reset_all_caches()
    before = engine.metric("vllm:num_preemptions")
    prompts = [prompt(f"grows {n}", 60 + 17 * n) for n in range(4)]
    answers = engine.complete_all(prompts, tokens=150)
    preemptions = engine.metric("vllm:num_preemptions") - before
    engine.reset_own_cache()
    for asked, answer in zip(prompts, answers[:4], strict=True):
        answers.append(engine.complete(asked + answer["tokens"] + [1, 2, 3]))
    facts = {"answers": answers, "preemptions": preemptions}
    return facts | {"ends": engine.open_state()} if engine.has_kvcache else facts


def abort_of_a_preempted_request(engine: Engine) -> dict[str, Any]:
    """A preempted request is aborted before vLLM resumes it."""
    engine.reset_all_caches()
    for n in range(4):
        engine.add(f"grows{n}", prompt(f"aborted {n}", 90), tokens=150)
    while not any(request.num_preemptions for request in engine.scheduler.requests.values()):
        engine.step()
    [name] = [f"grows{n}" for n in range(4) if engine.request(f"grows{n}").num_preemptions]
    engine.abort(name)
    aborted = engine.scheduler_side.requests
    answers = engine.drain()
    return {
        "in tables": any(key.startswith(name) for key in aborted), "answers": len(answers),
        "ends": engine.open_state(),
    }  # fmt: skip


def many_chats(engine: Engine) -> dict[str, Any]:
    """Chats of about 90 blocks take turns over an L1 of 40."""
    engine.reset_all_caches()
    before = engine.l1_stats if engine.has_kvcache else None
    histories = [prompt(f"chat {n}", 150) for n in range(10)]
    answers, used = [], 0
    for turn in range(3):
        for n, history in enumerate(histories):
            answers.append(engine.complete(history, tokens=20))
            histories[n] = history + answers[-1]["tokens"] + prompt(f"{n} {turn}", 30)
            used = max(used, engine.l1_stats.used_blocks) if engine.has_kvcache else 0
    facts: dict[str, Any] = {"answers": answers}
    if before is not None:
        after = engine.l1_stats
        names = ("stored_blocks", "evicted_blocks", "dropped_blocks", "failed_blocks", "hit_blocks")
        facts |= {name: getattr(after, name) - getattr(before, name) for name in names}
        facts |= {"most": used, "used": after.used_blocks, "capacity": after.capacity_blocks}
    return facts
