"""Acts for engines whose scheduler or workers are in other processes than the one that asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.support.engine.engine import BLOCK, Answer, Engine, prompt


def turns(engine: Engine) -> list[Answer]:
    """Two prompts with a common head, asked twice; between, the engine's own cache is emptied."""
    head = prompt("head", 3 * BLOCK)
    prompts = [head + prompt(f"tail {n}", 100) for n in range(2)]
    answers = engine.together(prompts, tokens=40)
    engine.evict_own()
    for n, asked in enumerate(prompts):
        prompts[n] = asked + answers[n]["tokens"] + prompt(f"next {n}", 20)
    return answers + engine.together(prompts, tokens=8)


def hits(engine: Engine) -> float:
    """Tokens that came from kvcache, as vLLM counts them."""
    return engine.metric("vllm:external_prefix_cache_hits")


def memory(engine: Engine) -> dict[str, list[int]]:
    """The processes under this one, and those of them that have a slab open or mapped."""
    pids = family(os.getpid())
    return {"family": pids, "slabs": [pid for pid in pids if slabs_of(pid)]}


def one_rank_fails(engine: Engine) -> dict[str, Any]:
    """The load of rank 1 fails, once; rank 0's does not."""
    engine.fresh()
    asked = prompt("of two ranks", 5 * BLOCK + 7)
    engine.ask(asked, tokens=2)
    engine.evict_own()
    before = engine.l1
    engine.core.engine_core.engine_core.model_executor.collective_rpc(_fail_one_load)
    engine.add("fails", asked + prompt("more", BLOCK), tokens=6)
    keys = list(engine.request("fails").block_hashes)
    engine.step()
    after = engine.l1
    step = {
        "dropped": after.dropped_blocks - before.dropped_blocks,
        "stored": after.stored_blocks - before.stored_blocks,
        "pinned": after.pinned_slots,
    }
    answer = engine.drain()["fails"]
    held = engine.held(keys)
    engine.evict_own()
    again = engine.ask(asked + prompt("more", BLOCK), tokens=6)
    engine.fresh()
    right = engine.ask(asked + prompt("more", BLOCK), tokens=6)
    return {
        "step": step, "held": held, "again": again["cached"],
        "tokens": [answer["tokens"], again["tokens"]], "right": right["tokens"],
        "ends": engine.open_ends(),
    }  # fmt: skip


def ends(engine: Engine) -> dict[str, int]:
    """After everything."""
    return engine.open_ends()


def _fail_one_load(worker: Any) -> None:
    """Runs in every worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.parallel_state import get_tp_group

    if get_tp_group().rank_in_group != 1:
        return
    copier = get_kv_transfer_group().worker_side.copier

    def fail(*arguments: Any, **options: Any) -> None:
        del copier.scatter  # the class's own again
        raise OSError("a copy that fails on purpose")

    copier.scatter = fail


def slabs_of(pid: int) -> list[str]:
    """What of kvcache's memory a process has open or mapped; nothing when it is gone."""
    found = []
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            found += [target for target in [str(fd.readlink())] if "kvcache-" in target]
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # ended while we looked
        return []
    return found + [line for line in maps.splitlines() if "memfd:kvcache-" in line]


def family(pid: int) -> list[int]:
    """`pid` and all that descend from it."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").iterdir():
            pids += [int(child) for child in (task / "children").read_text().split()]
    return pids
