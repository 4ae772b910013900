"""Scenarios for one engine with kvcache: contents, aborts, resets and failed copies.

They need the scheduler and the worker in the process of the engine. They return facts, which tests
check; they assert preconditions only.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from tests.support.engine.engine import BLOCK, Engine, prompt
from tests.support.engine.process import Scenario


def restored_pages(engine: Engine) -> dict[str, Any]:
    """Hash the pages of six blocks when computed, when overwritten, and when loaded again."""
    engine.reset_all_caches()
    six = prompt("six blocks", 6 * BLOCK + 1)

    def read(blocks: list[int]) -> list[list[str]]:
        return [
            [sha256(engine.page(layer, block)).hexdigest() for block in blocks]
            for layer in range(engine.layers)
        ]

    engine.add("first", six, tokens=2)
    engine.step()
    places = engine.block_ids("first")[:6]
    computed = read(places)
    engine.drain()
    engine.reset_own_cache()
    use_every_page(engine)
    overwritten = read(places)
    engine.reset_own_cache()
    engine.add("second", six, tokens=2)
    engine.step()
    restored = read(engine.block_ids("second")[:6])
    engine.drain()
    return {"computed": computed, "overwritten": overwritten, "restored": restored}


def use_every_page(engine: Engine) -> None:
    """Prefill twice as many blocks as vLLM has: it reuses the least recently used block first."""
    engine.complete_all([prompt(f"traffic {n}", 13 * BLOCK) for n in range(6)], tokens=1)


def corrupted_slot(engine: Engine) -> dict[str, Any]:
    """Complete a prompt before and after every fourth byte of one slot is changed."""
    engine.reset_all_caches()
    asked = prompt("corrupted", 100)
    engine.add("names", asked)
    keys = list(engine.request("names").block_hashes)
    engine.drain()
    engine.reset_own_cache()
    right = engine.complete(asked)
    engine.reset_own_cache()
    front = engine.stack.front
    with front.pin(keys[1:2]) as lease:
        [view] = lease.views
        for at in range(0, len(view), 4):
            view[at] ^= 0x40
    wrong = engine.complete(asked)
    return {"right": right, "wrong": wrong}


def salted_prompts(engine: Engine) -> dict[str, int]:
    """Return the cached tokens of one prompt under two salts and without one."""
    engine.reset_all_caches()
    asked = prompt("salted", 100)
    cached = {}
    for name, salt in [("a", "a"), ("b", "b"), ("none", None), ("a again", "a")]:
        cached[name] = engine.complete(asked, salt=salt)["cached"]
        engine.reset_own_cache()
    return cached


def external_hits(engine: Engine) -> dict[str, Any]:
    """Return vLLM's counters of a hit of three blocks after two in its own cache."""
    engine.reset_all_caches()
    asked = prompt("counted", 5 * BLOCK + 3)
    engine.complete(asked)
    engine.reset_own_cache()
    engine.complete(asked[: 2 * BLOCK + 1])
    before = engine.metric("vllm:external_prefix_cache_hits"), engine.l1_stats.hit_blocks
    asked_before = engine.metric("vllm:external_prefix_cache_queries")
    answer = engine.complete(asked)
    return {
        "cached": answer["cached"],
        "hits": engine.metric("vllm:external_prefix_cache_hits") - before[0],
        "queries": engine.metric("vllm:external_prefix_cache_queries") - asked_before,
        "hit_blocks": engine.l1_stats.hit_blocks - before[1],
    }


# Aborts


def abort_before_any_step(engine: Engine) -> dict[str, Any]:
    engine.reset_all_caches()
    engine.add("gone", prompt("before any step", 100))
    engine.abort("gone")
    engine.drain()
    return engine.open_state()


def abort_with_a_promise(engine: Engine) -> dict[str, Any]:
    """A waiting request has pinned its hit; a running one occupies vLLM's blocks."""
    engine.reset_all_caches()
    known = prompt("promised", 12 * BLOCK)
    engine.complete(known)
    engine.reset_own_cache()
    # Of 39 blocks the running request has 29. The waiting one needs 17: 12 of them are its hit.
    engine.add("runs", prompt("runs", 28 * BLOCK), tokens=30)
    while engine.request("runs").num_computed_tokens < 28 * BLOCK:
        engine.step()
    engine.add("waits", known + prompt("much more", 5 * BLOCK))
    engine.step()
    waiting = engine.open_state()
    engine.abort("waits")
    aborted = engine.open_state()
    engine.drain()
    return {"waiting": waiting, "aborted": aborted, "drained": engine.open_state()}


def abort_after_load(engine: Engine) -> dict[str, Any]:
    engine.reset_all_caches()
    known = prompt("loaded", 5 * BLOCK)
    engine.complete(known)
    engine.reset_own_cache()
    loaded = engine.metric("vllm:external_prefix_cache_hits")
    engine.add("gone", known + prompt("more", 300), tokens=50)
    engine.step()
    loaded = engine.metric("vllm:external_prefix_cache_hits") - loaded
    engine.abort("gone")
    engine.drain()
    return {"loaded": loaded, "drained": engine.open_state()}


def abort_between_chunks(engine: Engine) -> dict[str, Any]:
    engine.reset_all_caches()
    engine.add("gone", prompt("chunks", 700))
    engine.step()
    done = engine.request("gone").num_computed_tokens
    engine.abort("gone")
    engine.drain()
    return {"done": done, "used": engine.l1_stats.used_blocks, "drained": engine.open_state()}


def abort_while_decoding(engine: Engine) -> dict[str, Any]:
    engine.reset_all_caches()
    engine.add("gone", prompt("decodes", 40), tokens=100)
    for _ in range(60):
        engine.step()
    engine.abort("gone")
    engine.drain()
    return {"used": engine.l1_stats.used_blocks, "drained": engine.open_state()}


def abort_one_of_two(engine: Engine) -> dict[str, Any]:
    """Abort the request that computes a prefix which another request found in the same step."""
    engine.reset_all_caches()
    prefix = prompt("of two", 4 * BLOCK)
    engine.add("goes", prefix + prompt("goes", 40))
    engine.add("stays", prefix + prompt("stays", 40))
    engine.step()
    engine.abort("goes")
    answer = engine.drain()["stays"]
    engine.reset_own_cache()
    again = engine.complete(prefix + prompt("stays", 40))
    return {"first": answer["tokens"], "again": again["tokens"], "drained": engine.open_state()}


# Resets


def reset_idle(engine: Engine) -> dict[str, Any]:
    engine.reset_all_caches()
    asked = prompt("reset", 100)
    engine.complete(asked)
    used = engine.l1_stats.used_blocks
    engine.reset_all_caches()
    after = engine.l1_stats.used_blocks
    return {"used": used, "after": after, "cached": engine.complete(asked)["cached"]}


def reset_without_the_connector(engine: Engine) -> int:
    """A reset of vLLM's own cache alone: L1 keeps its blocks."""
    engine.reset_all_caches()
    asked = prompt("kept", 100)
    engine.complete(asked)
    assert engine.llm.reset_prefix_cache()
    return int(engine.complete(asked)["cached"])


def reset_under_a_running_request(engine: Engine) -> dict[str, Any]:
    """vLLM refuses to reset its own cache; kvcache forgets what the request has computed.

    Nor does a later request with the same prompt find it, in the engine's own cache or here.
    """
    engine.reset_all_caches()
    asked = prompt("runs on", 100)
    engine.add("runs on", asked, tokens=80)
    for _ in range(20):
        engine.step()
    done = engine.llm.reset_prefix_cache(reset_connector=True)
    used_after_reset = engine.l1_stats.used_blocks
    engine.drain()
    used = engine.l1_stats.used_blocks
    later = engine.complete(asked)["cached"]
    engine.reset_all_caches()
    engine.reset_own_cache()
    return {
        "reset": done, "used after reset": used_after_reset, "used": used,
        "later": later, "cached": engine.complete(asked)["cached"], "ends": engine.open_state(),
    }  # fmt: skip


def reset_with_a_promise(engine: Engine) -> dict[str, Any]:
    """A reset drops the pinned hit of a waiting request, which then computes its prompt."""
    engine.reset_all_caches()
    known = prompt("promised and reset", 12 * BLOCK)
    right = engine.complete(known)
    engine.reset_own_cache()
    engine.add("runs", prompt("runs", 28 * BLOCK), tokens=30)
    while engine.request("runs").num_computed_tokens < 28 * BLOCK:
        engine.step()
    engine.add("waits", known)
    engine.step()
    waiting = engine.open_state()
    engine.llm.reset_prefix_cache(reset_connector=True)
    reset = engine.open_state()
    answer = engine.drain()["waits"]
    return {
        "waiting": waiting, "reset": reset, "drained": engine.open_state(),
        "cached": answer["cached"], "same": answer["tokens"] == right["tokens"],
    }  # fmt: skip


# Failing copies


def failed_load(engine: Engine) -> dict[str, Any]:
    """The load of a hit of four blocks fails in a step that computes two more."""
    engine.reset_all_caches()
    known = prompt("fails to load", 4 * BLOCK + 3)
    engine.complete(known, tokens=1)
    asked = known + prompt("beyond", 2 * BLOCK)
    engine.reset_own_cache()
    before = engine.l1_stats
    with engine.failing_copies("scatter") as calls:
        engine.add("hit", asked)
        keys = list(engine.request("hit").block_hashes)
        engine.step()
        after = engine.l1_stats
        step = {
            "dropped": after.dropped_blocks - before.dropped_blocks,
            "stored": after.stored_blocks - before.stored_blocks,
            "held": engine.held_in_l1(keys),
            "pinned": after.pinned_slots,
        }
        answer = engine.drain()["hit"]
    held = engine.held_in_l1(keys)
    engine.reset_all_caches()
    cold = engine.complete(asked)
    return {
        "loads": calls, "step": step, "held": held, "ends": engine.open_state(),
        "answer": answer, "cold": cold,
    }  # fmt: skip


def failed_load_asked_for_again(engine: Engine) -> dict[str, Any]:
    """Blocks computed after a failed load in the same step are not found later."""
    engine.reset_all_caches()
    known = prompt("fails and is asked for", 4 * BLOCK + 3)
    asked = known + prompt("beyond that", 2 * BLOCK)
    engine.complete(known, tokens=1)
    engine.reset_own_cache()
    use_every_page(engine)
    engine.reset_own_cache()
    with engine.failing_copies("scatter") as calls:
        answers = [engine.complete(asked, tokens=16)]
    answers.append(engine.complete(asked, tokens=16))  # from its own cache
    engine.reset_own_cache()
    answers.append(engine.complete(asked, tokens=16))
    engine.reset_all_caches()
    cold = engine.complete(asked, tokens=16)
    return {
        "loads": calls[:1], "tokens": [answer["tokens"] for answer in answers],
        "cached": answers[-1]["cached"], "cold": cold["tokens"], "ends": engine.open_state(),
    }  # fmt: skip


def failed_load_of_all_it_has(engine: Engine) -> dict[str, Any]:
    """A load fails in a step that completes no block; the prefix is stored again."""
    engine.reset_all_caches()
    known = prompt("fails and completes none", 4 * BLOCK + 3)
    engine.complete(known, tokens=1)
    engine.reset_own_cache()
    with engine.failing_copies("scatter"):
        engine.add("hit", known, tokens=4)
        keys = list(engine.request("hit").block_hashes)
        engine.drain()
    return {"held": engine.held_in_l1(keys), "ends": engine.open_state()}


def failed_load_of_two(engine: Engine) -> dict[str, Any]:
    """Two requests of one step share the blocks of a failing load."""
    engine.reset_all_caches()
    known = prompt("fails for two", 4 * BLOCK)
    prompts = [known + prompt(f"of {number}", 20) for number in range(2)]
    engine.complete(known)
    engine.reset_own_cache()
    with engine.failing_copies("scatter") as calls:
        answers = engine.complete_all(prompts)
    engine.reset_own_cache()
    again = engine.complete_all(prompts)
    engine.reset_all_caches()
    right = engine.complete_all(prompts)
    return {
        "calls": len(calls), "ends": engine.open_state(), "again": [a["tokens"] for a in again],
        "tokens": [a["tokens"] for a in answers], "right": [a["tokens"] for a in right],
    }  # fmt: skip


def abort_after_a_failed_load(engine: Engine) -> dict[str, Any]:
    """Abort a request after its load failed and before vLLM computes its blocks again."""
    engine.reset_all_caches()
    known = prompt("fails and goes", 4 * BLOCK)
    asked = known + prompt("unseen", 40)
    engine.complete(known)
    engine.reset_own_cache()
    use_every_page(engine)
    engine.reset_own_cache()
    with engine.failing_copies("scatter"):
        engine.add("goes", asked)
        engine.step()
        engine.abort("goes")
        engine.drain()
    own = [engine.complete(asked)["tokens"] for _ in range(2)]
    engine.reset_own_cache()
    again = engine.complete(asked)
    engine.reset_all_caches()
    right = engine.complete(asked)
    return {
        "answers": [*own, again["tokens"]], "right": right["tokens"],
        "ends": engine.open_state(),
    }  # fmt: skip


def failed_store(engine: Engine) -> dict[str, Any]:
    """A store fails: L1 publishes none of its blocks, and the next step stores them again."""
    engine.reset_all_caches()
    asked = prompt("fails to store", 4 * BLOCK + 3)
    before = engine.l1_stats
    with engine.failing_copies("gather"):
        engine.add("computed", asked, tokens=4)
        keys = list(engine.request("computed").block_hashes)
        engine.step()
        after = engine.l1_stats
        step = {
            "failed": after.failed_blocks - before.failed_blocks,
            "stored": after.stored_blocks - before.stored_blocks,
            "held": engine.held_in_l1(keys),
            "pinned": after.pinned_slots,
        }
        engine.drain()
    held = engine.held_in_l1(keys)
    engine.reset_own_cache()
    return {
        "step": step, "held": held, "cached": engine.complete(asked)["cached"],
        "ends": engine.open_state(),
    }  # fmt: skip


def final_state(engine: Engine) -> dict[str, int]:
    """Return the open state after all other scenarios."""
    return engine.open_state()


SCENARIOS: tuple[Scenario, ...] = (
    restored_pages, corrupted_slot, salted_prompts, external_hits,
    abort_before_any_step, abort_with_a_promise, abort_after_load, abort_between_chunks,
    abort_while_decoding, abort_one_of_two,
    reset_idle, reset_without_the_connector, reset_under_a_running_request,
    reset_with_a_promise,
    failed_load, failed_load_of_all_it_has, failed_load_of_two, abort_after_a_failed_load,
    failed_store, final_state,
)  # fmt: skip
