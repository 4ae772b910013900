"""What kvcache costs an engine without hits, and what a hit is worth: a real vLLM, one run."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("vllm")

from kvcache.cli.demo import checkpoint, engine

pytestmark = [pytest.mark.bench, pytest.mark.engine]

PROMPT, ANSWER, PAIRS = 2048, 8, 40


@pytest.mark.parametrize("profile", ["l1-only", "l1-disk"])
def test_no_hits_cost_one_per_cent_at_most(tmp_path: Path, profile: str) -> None:
    """One engine, whose connector is taken out and put back between requests never seen before.

    Two engines would not do: equal processes differ by several per cent for as long as they live,
    by where their memory happens to lie.
    """
    model = str(checkpoint.write(tmp_path / "model"))
    blocks = 2 * (PROMPT + ANSWER) // engine.BLOCK_TOKENS
    setup = engine.EngineSetup(model, PROMPT + ANSWER, blocks, l1_nbytes=512 << 20)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    environment = {"KVCACHE_PROFILE": profile}
    if profile == "l1-disk":
        environment["KVCACHE__DISK__PATH"] = str(tmp_path / "disk")
        environment["KVCACHE__DISK__CAPACITY"] = "4GiB"
    spawn.Process(target=pairs, args=(setup, environment, theirs), daemon=True).start()
    theirs.close()
    spent: list[tuple[float, float]] = ours.recv()
    ratios = [with_it / without for without, with_it in spent]
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"{profile}: with / without, quartiles of {PAIRS} pairs: {quartiles}")
    print("medians in s:", [statistics.median(values) for values in zip(*spent, strict=True)])
    assert statistics.median(ratios) <= 1.01


def pairs(setup: engine.EngineSetup, environment: dict[str, str], pipe: Connection) -> None:
    """Send the seconds of requests without the connector and with it, pair by pair."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    engine.set_environment(setup)
    os.environ.update(environment)
    llm = engine.start(setup)
    from vllm.distributed.kv_transfer import kv_transfer_state

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    halves = scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
    random = Random(0)

    def seconds(*connected: object) -> float:
        scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = connected
        prompt = [random.randrange(8000) for _ in range(PROMPT)]
        begun = time.perf_counter()
        answer = engine.ask(llm.llm_engine, prompt, ANSWER)
        spent = time.perf_counter() - begun
        assert answer.cached_tokens == 0
        return spent

    found = []
    for pair in range(PAIRS + 2):
        turns = [(None, None), halves] if pair % 2 else [halves, (None, None)]
        spent = {turn == halves: seconds(*turn) for turn in turns}
        if pair >= 2:
            found.append((spent[False], spent[True]))
    assert halves[0].stats().tiers[0].stored_blocks >= PAIRS * PROMPT // engine.BLOCK_TOKENS
    scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = halves
    pipe.send(found)


def test_the_demo_reaches_its_bars() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvcache", "demo", "--json"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["identical_outputs"] is True
    assert found["pinned_slots_after"] == 0
    assert found["ttft_speedup"] >= 8
    assert found["ttft_p50_hit_s"] <= 1.3 * found["ttft_p50_own_cache_s"]
