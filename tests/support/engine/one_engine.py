"""Acts for one engine with kvcache: what it holds, loses, forgets and recovers from.

They reach into the scheduler and the worker, so both must be in the engine's own process. Facts
come back, tests judge them; an act asserts only what it stands on.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from tests.support.engine.engine import BLOCK, Engine, prompt
from tests.support.engine.process import Act


def pages(engine: Engine) -> dict[str, Any]:
    """The pages of six blocks as computed, after other traffic went over them, and as restored."""
    engine.fresh()
    six = prompt("six blocks", 6 * BLOCK + 1)

    def read(blocks: list[int]) -> list[list[str]]:
        return [
            [sha256(engine.page(layer, block)).hexdigest() for block in blocks]
            for layer in range(engine.layers)
        ]

    engine.add("first", six, tokens=2)
    engine.step()
    places = engine.blocks("first")[:6]
    computed = read(places)
    engine.drain()
    engine.evict_own()
    use_every_page(engine)
    overwritten = read(places)
    engine.evict_own()
    engine.add("second", six, tokens=2)
    engine.step()
    restored = read(engine.blocks("second")[:6])
    engine.drain()
    return {"computed": computed, "overwritten": overwritten, "restored": restored}


def use_every_page(engine: Engine) -> None:
    """Prefill twice the engine's cache: vLLM takes the longest unused block that has a hash."""
    engine.together([prompt(f"traffic {n}", 13 * BLOCK) for n in range(6)], tokens=1)


def corrupted(engine: Engine) -> dict[str, Any]:
    """The answer before and after one byte in each word of one slot is turned over."""
    engine.fresh()
    asked = prompt("corrupted", 100)
    engine.add("names", asked)
    keys = list(engine.request("names").block_hashes)
    engine.drain()
    engine.evict_own()
    right = engine.ask(asked)
    engine.evict_own()
    front = engine.side.stack.front
    with front.pin(keys[1:2]) as lease:
        [view] = lease.views
        for at in range(0, len(view), 4):
            view[at] ^= 0x40
    wrong = engine.ask(asked)
    return {"right": right, "wrong": wrong}


def salted(engine: Engine) -> dict[str, int]:
    """One prompt under two salts and under none: cached tokens of each asking."""
    engine.fresh()
    asked = prompt("salted", 100)
    cached = {}
    for name, salt in [("a", "a"), ("b", "b"), ("none", None), ("a again", "a")]:
        cached[name] = engine.ask(asked, salt=salt)["cached"]
        engine.evict_own()
    return cached


def external_hits(engine: Engine) -> dict[str, Any]:
    """vLLM's own counters over one hit of three blocks beyond two that the engine has."""
    engine.fresh()
    asked = prompt("counted", 5 * BLOCK + 3)
    engine.ask(asked)
    engine.evict_own()
    engine.ask(asked[: 2 * BLOCK + 1])
    before = engine.metric("vllm:external_prefix_cache_hits"), engine.l1.hit_blocks
    asked_before = engine.metric("vllm:external_prefix_cache_queries")
    answer = engine.ask(asked)
    return {
        "cached": answer["cached"],
        "hits": engine.metric("vllm:external_prefix_cache_hits") - before[0],
        "queries": engine.metric("vllm:external_prefix_cache_queries") - asked_before,
        "hit_blocks": engine.l1.hit_blocks - before[1],
    }


# Aborts


def abort_before_any_step(engine: Engine) -> dict[str, Any]:
    engine.fresh()
    engine.add("gone", prompt("before any step", 100))
    engine.abort("gone")
    engine.drain()
    return engine.open_ends()


def abort_with_a_promise(engine: Engine) -> dict[str, Any]:
    """The request waits, its hit pinned, since a running one has the engine's blocks."""
    engine.fresh()
    known = prompt("promised", 12 * BLOCK)
    engine.ask(known)
    engine.evict_own()
    # 39 blocks: the runner takes 29, of the other's 17 twelve are promised.
    engine.add("runs", prompt("runs", 28 * BLOCK), tokens=30)
    while engine.request("runs").num_computed_tokens < 28 * BLOCK:
        engine.step()
    engine.add("waits", known + prompt("much more", 5 * BLOCK))
    engine.step()
    waiting = engine.open_ends()
    engine.abort("waits")
    aborted = engine.open_ends()
    engine.drain()
    return {"waiting": waiting, "aborted": aborted, "drained": engine.open_ends()}


def abort_after_load(engine: Engine) -> dict[str, Any]:
    engine.fresh()
    known = prompt("loaded", 5 * BLOCK)
    engine.ask(known)
    engine.evict_own()
    loaded = engine.metric("vllm:external_prefix_cache_hits")
    engine.add("gone", known + prompt("more", 300), tokens=50)
    engine.step()
    loaded = engine.metric("vllm:external_prefix_cache_hits") - loaded
    engine.abort("gone")
    engine.drain()
    return {"loaded": loaded, "drained": engine.open_ends()}


def abort_between_chunks(engine: Engine) -> dict[str, Any]:
    engine.fresh()
    engine.add("gone", prompt("chunks", 700))
    engine.step()
    done = engine.request("gone").num_computed_tokens
    engine.abort("gone")
    engine.drain()
    return {"done": done, "used": engine.l1.used_blocks, "drained": engine.open_ends()}


def abort_while_decoding(engine: Engine) -> dict[str, Any]:
    engine.fresh()
    engine.add("gone", prompt("decodes", 40), tokens=100)
    for _ in range(60):
        engine.step()
    engine.abort("gone")
    engine.drain()
    return {"used": engine.l1.used_blocks, "drained": engine.open_ends()}


def abort_one_of_two(engine: Engine) -> dict[str, Any]:
    """One computes a shared prefix and goes; the other, which found it in the same step, stays."""
    engine.fresh()
    prefix = prompt("of two", 4 * BLOCK)
    engine.add("goes", prefix + prompt("goes", 40))
    engine.add("stays", prefix + prompt("stays", 40))
    engine.step()
    engine.abort("goes")
    answer = engine.drain()["stays"]
    engine.evict_own()
    again = engine.ask(prefix + prompt("stays", 40))
    return {"first": answer["tokens"], "again": again["tokens"], "drained": engine.open_ends()}


# Resets


def reset_idle(engine: Engine) -> dict[str, Any]:
    engine.fresh()
    asked = prompt("reset", 100)
    engine.ask(asked)
    used = engine.l1.used_blocks
    engine.fresh()
    after = engine.l1.used_blocks
    return {"used": used, "after": after, "cached": engine.ask(asked)["cached"]}


def reset_without_the_connector(engine: Engine) -> int:
    """Only the engine forgets: what L1 has stays good."""
    engine.fresh()
    asked = prompt("kept", 100)
    engine.ask(asked)
    assert engine.llm.reset_prefix_cache()
    return int(engine.ask(asked)["cached"])


def reset_under_a_running_request(engine: Engine) -> dict[str, Any]:
    """The engine cannot reset its own cache under it; what it computed before is kept no more.

    Nor does a later request with the same prompt find it, in the engine's own cache or here.
    """
    engine.fresh()
    asked = prompt("runs on", 100)
    engine.add("runs on", asked, tokens=80)
    for _ in range(20):
        engine.step()
    done = engine.llm.reset_prefix_cache(reset_connector=True)
    used_then = engine.l1.used_blocks
    engine.drain()
    used = engine.l1.used_blocks
    later = engine.ask(asked)["cached"]
    engine.fresh()
    engine.evict_own()
    return {
        "reset": done, "used then": used_then, "used": used,
        "later": later, "cached": engine.ask(asked)["cached"], "ends": engine.open_ends(),
    }  # fmt: skip


def reset_with_a_promise(engine: Engine) -> dict[str, Any]:
    """A waiting request's promise ends; it is computed, and right."""
    engine.fresh()
    known = prompt("promised and reset", 12 * BLOCK)
    right = engine.ask(known)
    engine.evict_own()
    engine.add("runs", prompt("runs", 28 * BLOCK), tokens=30)
    while engine.request("runs").num_computed_tokens < 28 * BLOCK:
        engine.step()
    engine.add("waits", known)
    engine.step()
    waiting = engine.open_ends()
    engine.llm.reset_prefix_cache(reset_connector=True)
    reset = engine.open_ends()
    answer = engine.drain()["waits"]
    return {
        "waiting": waiting, "reset": reset, "drained": engine.open_ends(),
        "cached": answer["cached"], "same": answer["tokens"] == right["tokens"],
    }  # fmt: skip


# Failing copies


def failed_load(engine: Engine) -> dict[str, Any]:
    """A hit of four blocks that cannot be copied, in a step that completes two more."""
    engine.fresh()
    known = prompt("fails to load", 4 * BLOCK + 3)
    engine.ask(known, tokens=1)
    asked = known + prompt("beyond", 2 * BLOCK)
    engine.evict_own()
    before = engine.l1
    with engine.failing("scatter") as calls:
        engine.add("hit", asked)
        keys = list(engine.request("hit").block_hashes)
        engine.step()
        after = engine.l1
        step = {
            "dropped": after.dropped_blocks - before.dropped_blocks,
            "stored": after.stored_blocks - before.stored_blocks,
            "held": engine.held(keys),
            "pinned": after.pinned_slots,
        }
        answer = engine.drain()["hit"]
    held = engine.held(keys)
    engine.fresh()
    cold = engine.ask(asked)
    return {
        "loads": calls, "step": step, "held": held, "ends": engine.open_ends(),
        "answer": answer, "cold": cold,
    }  # fmt: skip


def failed_load_asked_for_again(engine: Engine) -> dict[str, Any]:
    """What the step of a failing load computed after those blocks is not what is found later."""
    engine.fresh()
    known = prompt("fails and is asked for", 4 * BLOCK + 3)
    asked = known + prompt("beyond that", 2 * BLOCK)
    engine.ask(known, tokens=1)
    engine.evict_own()
    use_every_page(engine)
    engine.evict_own()
    with engine.failing("scatter") as calls:
        answers = [engine.ask(asked, tokens=16)]
    answers.append(engine.ask(asked, tokens=16))  # from its own cache
    engine.evict_own()
    answers.append(engine.ask(asked, tokens=16))
    engine.fresh()
    cold = engine.ask(asked, tokens=16)
    return {
        "loads": calls[:1], "tokens": [answer["tokens"] for answer in answers],
        "cached": answers[-1]["cached"], "cold": cold["tokens"], "ends": engine.open_ends(),
    }  # fmt: skip


def failed_load_of_all_it_has(engine: Engine) -> dict[str, Any]:
    """The step of the failing load completes no block of its own; is the prefix kept again?"""
    engine.fresh()
    known = prompt("fails and completes none", 4 * BLOCK + 3)
    engine.ask(known, tokens=1)
    engine.evict_own()
    with engine.failing("scatter"):
        engine.add("hit", known, tokens=4)
        keys = list(engine.request("hit").block_hashes)
        engine.drain()
    return {"held": engine.held(keys), "ends": engine.open_ends()}


def failed_load_of_two(engine: Engine) -> dict[str, Any]:
    """Two requests of one step share the blocks whose load fails."""
    engine.fresh()
    known = prompt("fails for two", 4 * BLOCK)
    prompts = [known + prompt(f"of {who}", 20) for who in range(2)]
    engine.ask(known)
    engine.evict_own()
    with engine.failing("scatter") as calls:
        answers = engine.together(prompts)
    engine.evict_own()
    again = engine.together(prompts)
    engine.fresh()
    right = engine.together(prompts)
    return {
        "calls": len(calls), "ends": engine.open_ends(), "again": [a["tokens"] for a in again],
        "tokens": [a["tokens"] for a in answers], "right": [a["tokens"] for a in right],
    }  # fmt: skip


def abort_after_a_failed_load(engine: Engine) -> dict[str, Any]:
    """The request goes before its blocks are computed again: nobody may find them."""
    engine.fresh()
    known = prompt("fails and goes", 4 * BLOCK)
    asked = known + prompt("unseen", 40)
    engine.ask(known)
    engine.evict_own()
    use_every_page(engine)
    engine.evict_own()
    with engine.failing("scatter"):
        engine.add("goes", asked)
        engine.step()
        engine.abort("goes")
        engine.drain()
    own = [engine.ask(asked)["tokens"] for _ in range(2)]
    engine.evict_own()
    again = engine.ask(asked)
    engine.fresh()
    right = engine.ask(asked)
    return {
        "answers": [*own, again["tokens"]], "right": right["tokens"],
        "ends": engine.open_ends(),
    }  # fmt: skip


def failed_store(engine: Engine) -> dict[str, Any]:
    """A copy out that fails: nothing of it is published, and the next step offers it again."""
    engine.fresh()
    asked = prompt("fails to store", 4 * BLOCK + 3)
    before = engine.l1
    with engine.failing("gather"):
        engine.add("computed", asked, tokens=4)
        keys = list(engine.request("computed").block_hashes)
        engine.step()
        after = engine.l1
        step = {
            "failed": after.failed_blocks - before.failed_blocks,
            "stored": after.stored_blocks - before.stored_blocks,
            "held": engine.held(keys),
            "pinned": after.pinned_slots,
        }
        engine.drain()
    held = engine.held(keys)
    engine.evict_own()
    return {
        "step": step, "held": held, "cached": engine.ask(asked)["cached"],
        "ends": engine.open_ends(),
    }  # fmt: skip


def ends(engine: Engine) -> dict[str, int]:
    """After everything."""
    return engine.open_ends()


ACTS: tuple[Act, ...] = (
    pages, corrupted, salted, external_hits,
    abort_before_any_step, abort_with_a_promise, abort_after_load, abort_between_chunks,
    abort_while_decoding, abort_one_of_two,
    reset_idle, reset_without_the_connector, reset_under_a_running_request,
    reset_with_a_promise,
    failed_load, failed_load_of_all_it_has, failed_load_of_two, abort_after_a_failed_load,
    failed_store, ends,
)  # fmt: skip
