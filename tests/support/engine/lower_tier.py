"""Acts for engines with a tier below L1."""

from __future__ import annotations

import os
import select
from typing import Any

from tests.support.engine.engine import BLOCK, Answer, Engine, prompt
from tests.support.engine.separate_processes import family, slabs_of

END_S = 60.0
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
    engine.side.stack.front.clear()
    engine.evict_own()
    engine.add("gone", PROMPTS[0], tokens=4)
    engine.abort("gone")
    engine.drain()
    again = engine.ask(PROMPTS[0], tokens=12)
    return {"ends": engine.open_ends(), "cached": again["cached"], "tokens": again["tokens"]}


def ask_until_it_dies(engine: Engine) -> list[bool]:
    """Prompts that nobody has seen, for an engine on a deadly disk: whether its processes end.

    Nobody waits for answers: vLLM would, for ever.
    """
    engine.ask(prompt("hello", BLOCK), tokens=2)  # a block is kept: its worker has the slab
    ends = [os.pidfd_open(pid) for pid in family(os.getpid()) if slabs_of(pid)]
    for number, asked in enumerate(PROMPTS):
        engine.add(f"dies {number}", asked, tokens=12)
    return [bool(select.select([end], [], [], END_S)[0]) for end in ends]


def counts(engine: Engine) -> dict[str, int]:
    """What the tier below did."""
    stack = engine.side.stack
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
