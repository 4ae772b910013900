"""An engine that sleeps. The scheduler and the worker are in the process of the engine."""

from __future__ import annotations

from typing import Any

from tests.support.engine.engine import Engine, prompt


def sleep_and_wake_up(engine: Engine) -> dict[str, Any]:
    """Complete a prompt before and after a sleep in which vLLM discards its KV cache.

    vLLM's CPU worker ignores a sleep. This makes the calls that its GPU worker makes (0.33).
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engine.reset_all_caches()
    asked, stack = prompt("sleeps", 100), engine.stack
    right = engine.complete(asked)
    engine.add("runs", prompt("runs before the sleep", 100), tokens=80)
    for _ in range(3):
        engine.step()
    engine.llm.sleep(level=1, mode="keep")
    get_kv_transfer_group().unregister_kv_caches()
    engine.overwrite_own_cache()
    asleep = engine.l1_stats.used_blocks
    get_kv_transfer_group().restore_kv_caches()
    engine.llm.wake_up()
    runs = engine.drain()["runs"]["tokens"]
    answers = [engine.complete(asked)]
    engine.overwrite_own_cache()
    answers.append(engine.complete(asked))
    return {
        "used asleep": asleep, "keeps its stack": engine.stack is stack, "tokens": len(runs),
        "equal": [{**answer, "cached": 0} == right for answer in answers],
        "cached": [answer["cached"] for answer in answers], "ends": engine.open_state(),
    }  # fmt: skip
