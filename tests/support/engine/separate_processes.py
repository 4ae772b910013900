"""Scenarios for engines with a scheduler or workers in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.support.engine.engine import BLOCK, Completion, Engine, prompt


def two_turns(engine: Engine) -> list[Completion]:
    """Two prompts with a common prefix, and the next turn of each after a reset of vLLM's cache."""
    head = prompt("head", 3 * BLOCK)
    prompts = [head + prompt(f"tail {n}", 100) for n in range(2)]
    answers = engine.complete_all(prompts, tokens=40)
    engine.reset_own_cache()
    for n, asked in enumerate(prompts):
        prompts[n] = asked + answers[n]["tokens"] + prompt(f"next {n}", 20)
    return answers + engine.complete_all(prompts, tokens=8)


def hit_tokens(engine: Engine) -> float:
    """Return vLLM's count of the tokens that kvcache provided."""
    return engine.metric("vllm:external_prefix_cache_hits")


def slab_processes(engine: Engine) -> dict[str, list[int]]:
    """Return the ids of this process and its descendants, and of those that have a slab."""
    pids = family(os.getpid())
    return {"family": pids, "slabs": [pid for pid in pids if slabs_of(pid)]}


def load_that_fails_on_one_rank(engine: Engine) -> dict[str, Any]:
    """The load fails once on rank 1 and not on rank 0."""
    engine.reset_all_caches()
    asked = prompt("of two ranks", 5 * BLOCK + 7)
    engine.complete(asked, tokens=2)
    engine.reset_own_cache()
    before = engine.l1_stats
    engine.core.engine_core.engine_core.model_executor.collective_rpc(_fail_one_load)
    engine.add("fails", asked + prompt("more", BLOCK), tokens=6)
    keys = list(engine.request("fails").block_hashes)
    engine.step()
    after = engine.l1_stats
    step = {
        "dropped": after.dropped_blocks - before.dropped_blocks,
        "stored": after.stored_blocks - before.stored_blocks,
        "pinned": after.pinned_slots,
    }
    answer = engine.drain()["fails"]
    held = engine.held_in_l1(keys)
    engine.reset_own_cache()
    again = engine.complete(asked + prompt("more", BLOCK), tokens=6)
    engine.reset_all_caches()
    right = engine.complete(asked + prompt("more", BLOCK), tokens=6)
    return {
        "step": step, "held": held, "again": again["cached"],
        "tokens": [answer["tokens"], again["tokens"]], "right": right["tokens"],
        "ends": engine.open_state(),
    }  # fmt: skip


def final_state(engine: Engine) -> dict[str, int]:
    """Return the open state after all other scenarios."""
    return engine.open_state()


def _fail_one_load(worker: Any) -> None:
    """Run in every worker; change rank 1."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.parallel_state import get_tp_group

    if get_tp_group().rank_in_group != 1:
        return
    copier = get_kv_transfer_group().worker_side.copier

    def fail(*arguments: Any, **options: Any) -> None:
        del copier.scatter  # uncovers the method of the class
        raise OSError("a copy that fails on purpose")

    copier.scatter = fail


def slabs_of(pid: int) -> list[str]:
    """Return the slabs that a process has open or mapped; none if it has ended."""
    found = []
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            found += [target for target in [str(fd.readlink())] if "kvcache-" in target]
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # the process has ended
        return []
    return found + [line for line in maps.splitlines() if "memfd:kvcache-" in line]


def family(pid: int) -> list[int]:
    """Return `pid` and its descendants."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").iterdir():
            pids += [int(child) for child in (task / "children").read_text().split()]
    return pids
