"""Scenarios with completions that must be equal on two engines, to the last bit of a logprob.

One engine has kvcache and a tiny cache of its own, the other a large cache and no kvcache. Both
find the same blocks, the first in L1 and the second in its own cache, and compute the other blocks
in the same shapes.
"""

from __future__ import annotations

from tests.support.engine.engine import BLOCK, Completion, Engine, prompt
from tests.support.engine.process import Scenario


def chats(engine: Engine) -> list[Completion]:
    """Four chats of three turns over one system prompt: far more blocks than a tiny cache holds."""
    engine.reset_all_caches()
    system = prompt("system", 200)
    histories = {user: system + prompt(f"{user} opens", 90) for user in ("a", "b", "c", "d")}
    answers: list[Completion] = []
    for turn in range(3):
        for user, history in histories.items():
            answer = engine.complete(history, tokens=24)
            answers.append(answer)
            histories[user] = history + answer["tokens"] + prompt(f"{user} {turn}", 70)
    return answers


def generated_blocks(engine: Engine) -> list[Completion]:
    """A second turn after a completion of several blocks."""
    engine.reset_all_caches()
    opening = prompt("opening", 40)
    first = engine.complete(opening, tokens=100)
    engine.reset_own_cache()
    return [first, engine.complete(opening + first["tokens"] + prompt("goes on", 10))]


def whole_blocks(engine: Engine) -> list[Completion]:
    """A prompt of exactly four blocks, three times."""
    engine.reset_all_caches()
    four = prompt("four blocks", 4 * BLOCK)
    answers = [engine.complete(four, tokens=2)]
    for _ in range(2):
        engine.reset_own_cache()
        answers.append(engine.complete(four, tokens=2))
    return answers


def concurrent_requests(engine: Engine) -> list[Completion]:
    """Three requests in one step share a prefix: at first no cache holds it, then all do."""
    engine.reset_all_caches()
    prefix = prompt("shared", 3 * BLOCK)
    prompts = [prefix + prompt(f"own {number}", 40) for number in range(3)]
    answers = engine.complete_all(prompts)
    engine.reset_own_cache()
    answers += engine.complete_all([history + prompt("more", 5) for history in prompts])
    return answers


def hit_in_both_caches(engine: Engine) -> list[Completion]:
    """A prompt with its first blocks in vLLM's own cache and the next ones in L1."""
    engine.reset_all_caches()
    known = prompt("known", 7 * BLOCK)
    answers = [engine.complete(known)]
    engine.reset_own_cache()
    answers.append(engine.complete(known[: 3 * BLOCK + 5]))
    answers.append(engine.complete(known + prompt("unknown", 20)))
    return answers


def chunked_prefill(engine: Engine) -> list[Completion]:
    """Prompts longer than a step; after its hit, the second is still longer than a step."""
    engine.reset_all_caches()
    long = prompt("long", 300)
    answers = [engine.complete(long)]
    engine.reset_own_cache()
    longer = long + prompt("longer", 600)
    answers.append(engine.complete(longer))
    engine.reset_own_cache()
    answers.append(engine.complete(longer + prompt("longest", 9)))
    return answers


def aborted_requests(engine: Engine) -> list[Completion]:
    """The blocks of two aborted requests: one between two chunks, one while it decodes."""
    engine.reset_all_caches()
    long = prompt("aborted", 600)
    engine.add("goes", long)
    engine.step()
    engine.abort("goes")
    engine.drain()
    engine.reset_own_cache()
    answers = [engine.complete(long)]
    short = prompt("aborted while decoding", 60)
    engine.add("decodes", short, tokens=200)
    for _ in range(50):
        engine.step()
    engine.abort("decodes")
    engine.drain()
    engine.reset_own_cache()
    answers.append(engine.complete(short, tokens=70))
    return answers


def reset_while_running(engine: Engine) -> list[Completion]:
    """Both caches are reset, and the running request starts again in the same step."""
    engine.reset_all_caches()
    interrupted = prompt("interrupted", 100)
    engine.add("interrupted", interrupted, tokens=60)
    for _ in range(40):
        engine.step()
    assert engine.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    answers = list(engine.drain().values())
    engine.reset_own_cache()
    answers.append(engine.complete(interrupted, tokens=60))
    return answers


def reassigned_blocks(engine: Engine) -> list[Completion]:
    """vLLM reassigns the blocks of a request that has ended while they may still be copied."""
    engine.reset_all_caches()
    known = prompt("gives", 28 * BLOCK + 5)
    for name, asked in (("gives", known), ("takes", prompt("takes", 28 * BLOCK + 5))):
        engine.add(name, asked, tokens=1)
        while engine.core.has_unfinished_requests():
            engine.step()
    engine.drain()
    engine.reset_own_cache()
    return [engine.complete(known)]


SCENARIOS: tuple[Scenario, ...] = (
    chats,
    generated_blocks,
    whole_blocks,
    concurrent_requests,
    hit_in_both_caches,
    chunked_prefill,
    aborted_requests,
    reset_while_running,
    reassigned_blocks,
)
