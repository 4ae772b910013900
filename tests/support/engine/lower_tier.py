"""Scenarios for engines with a lower tier."""

from __future__ import annotations

import os
import select
import signal
from typing import Any

from tests.support.engine.engine import BLOCK, Completion, Engine, prompt
from tests.support.engine.separate_processes import family, slabs_of

END_S = 60.0
PROMPTS = [prompt("head", 4 * BLOCK) + prompt(f"tail {n}", 90 + 40 * n) for n in range(3)]


def complete_prompts(engine: Engine) -> list[Completion]:
    """Complete new prompts."""
    return [engine.complete(asked, tokens=12) for asked in PROMPTS]


def repeat_prompts(engine: Engine) -> list[Completion]:
    """Complete the same prompts after vLLM's own cache was reset, if kvcache is connected."""
    if engine.has_kvcache:
        engine.reset_own_cache()
    return [engine.complete(asked, tokens=12) for asked in PROMPTS]


def abort_during_promotion(engine: Engine) -> dict[str, Any]:
    """Abort a request while its blocks are promoted from the lower tier."""
    engine.stack.front.clear()
    engine.reset_own_cache()
    engine.add("gone", PROMPTS[0], tokens=4)
    engine.abort("gone")
    engine.drain()
    again = engine.complete(PROMPTS[0], tokens=12)
    return {"ends": engine.open_state(), "cached": again["cached"], "tokens": again["tokens"]}


def complete_until_killed(engine: Engine) -> list[bool]:
    """Add new prompts on a `KillingDisk`; return whether each process with a slab has ended.

    It does not step, since vLLM would wait for its dead core for ever.
    """
    engine.complete(prompt("hello", BLOCK), tokens=2)  # so that the worker maps the slab
    ends = [os.pidfd_open(pid) for pid in family(os.getpid()) if slabs_of(pid)]
    for number, asked in enumerate(PROMPTS):
        engine.add(f"dies {number}", asked, tokens=12)
    return [bool(select.select([end], [], [], END_S)[0]) for end in ends]


def lower_tier_counts(engine: Engine) -> dict[str, int]:
    """Return the counts of the lower tier."""
    stack = engine.stack
    assert stack.flush(60)
    lower = stack.stats().lower[0]
    return {
        "stored": lower.stored_blocks,
        "loaded": lower.loaded_blocks,
        "missed": lower.missed_blocks,
        "dropped": lower.dropped_blocks,
        "errors": lower.errors,
        "pinned": stack.stats().pinned_slots,
    }


def repeat_prompts_without_servers(engine: Engine) -> dict[str, Any]:
    """Kill the processes in ``SERVER_PIDS``, empty L1, and complete the same prompts again."""
    for pid in os.environ["SERVER_PIDS"].split():
        os.kill(int(pid), signal.SIGKILL)
    engine.stack.front.clear()
    return {"answers": repeat_prompts(engine), "ends": engine.open_state()}


def tokens_of(answers: list[Completion]) -> list[Any]:
    """Return the tokens of each answer."""
    return [answer["tokens"] for answer in answers]


def cached_after_reset(engine: Engine) -> list[int]:
    """Return the cached tokens of a known prompt after a reset of all tiers."""
    engine.llm.reset_prefix_cache(reset_connector=True)
    return [engine.complete(asked, tokens=2)["cached"] for asked in PROMPTS[:1]]
