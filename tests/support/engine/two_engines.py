"""Acts for two engines: one with kvcache and a tiny cache, one without and with a large one.

Every act returns answers that must be equal on both, tokens and logprobs to the last bit: it asks
so that both engines find the same blocks, the one in L1, the other in its own cache, and compute
the rest in the same shapes.
"""

from __future__ import annotations

from tests.support.engine.engine import BLOCK, Answer, Engine, prompt
from tests.support.engine.process import Act


def chats(engine: Engine) -> list[Answer]:
    """Four chats of three turns over one system prompt: far more than a tiny cache holds."""
    engine.fresh()
    system = prompt("system", 200)
    histories = {user: system + prompt(f"{user} opens", 90) for user in ("a", "b", "c", "d")}
    answers: list[Answer] = []
    for turn in range(3):
        for user, history in histories.items():
            answer = engine.ask(history, tokens=24)
            answers.append(answer)
            histories[user] = history + answer["tokens"] + prompt(f"{user} {turn}", 70)
    return answers


def generated(engine: Engine) -> list[Answer]:
    """A second turn over a first whose answer is several blocks long."""
    engine.fresh()
    opening = prompt("opening", 40)
    first = engine.ask(opening, tokens=100)
    engine.evict_own()
    return [first, engine.ask(opening + first["tokens"] + prompt("goes on", 10))]


def whole_blocks(engine: Engine) -> list[Answer]:
    """A prompt of exactly four blocks, again and again."""
    engine.fresh()
    four = prompt("four blocks", 4 * BLOCK)
    answers = [engine.ask(four, tokens=2)]
    for _ in range(2):
        engine.evict_own()
        answers.append(engine.ask(four, tokens=2))
    return answers


def together(engine: Engine) -> list[Answer]:
    """Three requests in one step that share a prefix: new to every cache, then known to all."""
    engine.fresh()
    prefix = prompt("shared", 3 * BLOCK)
    prompts = [prefix + prompt(f"own {who}", 40) for who in range(3)]
    answers = engine.together(prompts)
    engine.evict_own()
    answers += engine.together([history + prompt("more", 5) for history in prompts])
    return answers


def partly_own(engine: Engine) -> list[Answer]:
    """A prompt whose head is in the engine's own cache and whose middle is in L1."""
    engine.fresh()
    known = prompt("known", 7 * BLOCK)
    answers = [engine.ask(known)]
    engine.evict_own()
    answers.append(engine.ask(known[: 3 * BLOCK + 5]))
    answers.append(engine.ask(known + prompt("unknown", 20)))
    return answers


def chunked(engine: Engine) -> list[Answer]:
    """Prompts longer than a step, the second after a hit and longer than one even so."""
    engine.fresh()
    long = prompt("long", 300)
    answers = [engine.ask(long)]
    engine.evict_own()
    longer = long + prompt("longer", 600)
    answers.append(engine.ask(longer))
    engine.evict_own()
    answers.append(engine.ask(longer + prompt("longest", 9)))
    return answers


def aborted_midway(engine: Engine) -> list[Answer]:
    """What a request left behind that was aborted between two chunks, and one while decoding."""
    engine.fresh()
    long = prompt("aborted", 600)
    engine.add("goes", long)
    engine.step()
    engine.abort("goes")
    engine.drain()
    engine.evict_own()
    answers = [engine.ask(long)]
    short = prompt("aborted while decoding", 60)
    engine.add("decodes", short, tokens=200)
    for _ in range(50):
        engine.step()
    engine.abort("decodes")
    engine.drain()
    engine.evict_own()
    answers.append(engine.ask(short, tokens=70))
    return answers


def reset_while_running(engine: Engine) -> list[Answer]:
    """Everything is forgotten and the running request starts again in the same step."""
    engine.fresh()
    interrupted = prompt("interrupted", 100)
    engine.add("interrupted", interrupted, tokens=60)
    for _ in range(40):
        engine.step()
    assert engine.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    answers = list(engine.drain().values())
    engine.evict_own()
    answers.append(engine.ask(interrupted, tokens=60))
    return answers


def blocks_that_change_hands(engine: Engine) -> list[Answer]:
    """A request takes the blocks of one that has just ended, whose copies may still go on."""
    engine.fresh()
    known = prompt("gives", 28 * BLOCK + 5)
    for name, asked in (("gives", known), ("takes", prompt("takes", 28 * BLOCK + 5))):
        engine.add(name, asked, tokens=1)
        while engine.core.has_unfinished_requests():
            engine.step()
    engine.drain()
    engine.evict_own()
    return [engine.ask(known)]


SAME: tuple[Act, ...] = (
    chats,
    generated,
    whole_blocks,
    together,
    partly_own,
    chunked,
    aborted_midway,
    reset_while_running,
    blocks_that_change_hands,
)
