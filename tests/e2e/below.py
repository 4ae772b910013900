"""Acts for engines with a tier below L1."""

from __future__ import annotations

from typing import Any

from tests.e2e.engine import BLOCK, Answer, Engine, prompt

PROMPTS = [prompt("head", 4 * BLOCK) + prompt(f"tail {n}", 90 + 40 * n) for n in range(3)]


def ask_first(engine: Engine) -> list[Answer]:
    """Prompts that nobody has seen."""
    return [engine.ask(asked, tokens=12) for asked in PROMPTS]


def ask_again(engine: Engine) -> list[Answer]:
    """The same prompts, from the engine's own cache or from wherever kvcache has them."""
    if engine.keeps:
        engine.evict_own()
    return [engine.ask(asked, tokens=12) for asked in PROMPTS]


def abort_while_it_waits(engine: Engine) -> dict[str, Any]:
    """A request is aborted while the tier below is read for it."""
    engine.side._stack.front.clear()
    engine.evict_own()
    engine.add("gone", PROMPTS[0], tokens=4)
    engine.abort("gone")
    engine.drain()
    again = engine.ask(PROMPTS[0], tokens=12)
    return {"ends": engine.open_ends(), "cached": again["cached"], "tokens": again["tokens"]}


def counts(engine: Engine) -> dict[str, int]:
    """What the tier below did."""
    stack = engine.side._stack
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


def after_reset(engine: Engine) -> list[int]:
    """Cached tokens when everything was reset: nothing of before is found, below L1 either."""
    engine.llm.reset_prefix_cache(reset_connector=True)
    return [engine.ask(asked, tokens=2)["cached"] for asked in PROMPTS[:1]]
