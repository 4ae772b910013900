"""Acts for an engine whose own cache, or whose L1, has not enough room for what runs.

How requests are batched depends on that room, so against a roomy engine the shapes of computation
differ and logprobs in their last digits: play these in float32, where that stays far from deciding
which token is best.
"""

from __future__ import annotations

from typing import Any

from tests.support.engine.engine import Engine, prompt


def preempted(engine: Engine) -> dict[str, Any]:
    """Four requests at once that grow until they do not fit; then the next turns of all."""
    engine.fresh()
    before = engine.metric("vllm:num_preemptions")
    prompts = [prompt(f"grows {n}", 60 + 17 * n) for n in range(4)]
    answers = engine.together(prompts, tokens=150)
    preemptions = engine.metric("vllm:num_preemptions") - before
    engine.evict_own()
    for asked, answer in zip(prompts, answers[:4], strict=True):
        answers.append(engine.ask(asked + answer["tokens"] + [1, 2, 3]))
    facts = {"answers": answers, "preemptions": preemptions}
    return facts | {"ends": engine.open_ends()} if engine.keeps else facts


def preempted_and_aborted(engine: Engine) -> dict[str, Any]:
    """A request that is aborted while it waits to be resumed."""
    engine.fresh()
    for n in range(4):
        engine.add(f"grows{n}", prompt(f"aborted {n}", 90), tokens=150)
    while not any(request.num_preemptions for request in engine.scheduler.requests.values()):
        engine.step()
    [name] = [f"grows{n}" for n in range(4) if engine.request(f"grows{n}").num_preemptions]
    engine.abort(name)
    aborted = engine.side.requests
    answers = engine.drain()
    return {
        "left": any(key.startswith(name) for key in aborted), "answers": len(answers),
        "ends": engine.open_ends(),
    }  # fmt: skip


def many_chats(engine: Engine) -> dict[str, Any]:
    """Chats of some 90 blocks in turn, over an L1 of 40."""
    engine.fresh()
    before = engine.l1 if engine.keeps else None
    histories = [prompt(f"chat {n}", 150) for n in range(10)]
    answers, used = [], 0
    for turn in range(3):
        for n, history in enumerate(histories):
            answers.append(engine.ask(history, tokens=20))
            histories[n] = history + answers[-1]["tokens"] + prompt(f"{n} {turn}", 30)
            used = max(used, engine.l1.used_blocks) if engine.keeps else 0
    facts: dict[str, Any] = {"answers": answers}
    if before is not None:
        after = engine.l1
        names = ("stored_blocks", "evicted_blocks", "dropped_blocks", "failed_blocks", "hit_blocks")
        facts |= {name: getattr(after, name) - getattr(before, name) for name in names}
        facts |= {"most": used, "used": after.used_blocks, "capacity": after.capacity_blocks}
    return facts
