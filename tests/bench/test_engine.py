"""The cost of kvcache without hits, and the gain of a hit, on a real vLLM within one run."""

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
def test_requests_without_hits_cost_at_most_one_per_cent(tmp_path: Path, profile: str) -> None:
    """Remove and restore the connector of one engine between new requests.

    Two engines cannot be compared: equal processes differ by several per cent for all their life,
    because of the placement of their memory.
    """
    model = str(checkpoint.write(tmp_path / "model"))
    blocks = 2 * (PROMPT + ANSWER) // engine.BLOCK_TOKENS
    setup = engine.EngineSetup(model, PROMPT + ANSWER, blocks, l1_nbytes=512 << 20)
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe()
    environment = {"KVCACHE_PROFILE": profile}
    if profile == "l1-disk":
        environment["KVCACHE__DISK__PATH"] = str(tmp_path / "disk")
        environment["KVCACHE__DISK__CAPACITY"] = "4GiB"
    spawn.Process(target=measure_pairs, args=(setup, environment, sender), daemon=True).start()
    sender.close()
    spent: list[tuple[float, float]] = receiver.recv()
    ratios = [with_it / without for without, with_it in spent]
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"{profile}: with / without, quartiles of {PAIRS} pairs: {quartiles}")
    print("medians in s:", [statistics.median(values) for values in zip(*spent, strict=True)])
    assert statistics.median(ratios) <= 1.01


def measure_pairs(setup: engine.EngineSetup, environment: dict[str, str], pipe: Connection) -> None:
    """Send, for each pair of requests, the seconds without the connector and with it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    engine.set_environment(setup)
    os.environ.update(environment)
    llm = engine.start(setup)
    from vllm.distributed.kv_transfer import kv_transfer_state

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    sides = scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
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
        turns = [(None, None), sides] if pair % 2 else [sides, (None, None)]
        spent = {turn == sides: seconds(*turn) for turn in turns}
        if pair >= 2:
            found.append((spent[False], spent[True]))
    assert sides[0].stats().tiers[0].stored_blocks >= PAIRS * PROMPT // engine.BLOCK_TOKENS
    scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = sides
    pipe.send(found)


def test_demo_reaches_its_bars() -> None:
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
