"""What kvcache costs an engine without hits, and what a hit is worth: a real vLLM, one run."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("vllm")

from kvcache.cli import checkpoint, engine

pytestmark = [pytest.mark.bench, pytest.mark.engine]

PROMPT, ANSWER, PAIRS = 2048, 8, 40


def test_no_hits_cost_one_per_cent_at_most(tmp_path: Path) -> None:
    """Two engines are up at once and take turns on the same prompts, none of them seen before."""
    model = str(checkpoint.write(tmp_path / "model"))
    blocks = 2 * (PROMPT + ANSWER) // engine.BLOCK_TOKENS
    setup = engine.Setup(model, PROMPT + ANSWER, blocks)
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, l1_nbytes in {"without": None, "with": 512 << 20}.items():
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(
            target=serve,
            args=(replace(setup, l1_nbytes=l1_nbytes), theirs),
            daemon=True,
        ).start()
    random = Random(0)
    spent: dict[str, list[float]] = {name: [] for name in pipes}
    for pair in range(PAIRS + 2):
        prompt = [random.randrange(8000) for _ in range(PROMPT)]
        for name in random.sample(list(pipes), 2):
            pipes[name].send(prompt)
            seconds, cached = pipes[name].recv()
            assert cached == 0
            if pair >= 2:
                spent[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(None)
    ratios = [b / a for a, b in zip(spent["without"], spent["with"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"with / without, quartiles of {PAIRS} pairs: {quartiles}")
    print({name: statistics.median(values) for name, values in spent.items()})
    assert statistics.median(ratios) <= 1.01


def serve(setup: engine.Setup, pipe: Connection) -> None:
    """Answer prompts that come through `pipe` with the seconds they took."""
    import time

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    engine._set_environment(setup)
    llm = engine._start(setup)
    while (prompt := pipe.recv()) is not None:
        begun = time.perf_counter()
        answer = engine._ask(llm.llm_engine, prompt, ANSWER)
        pipe.send((time.perf_counter() - begun, answer.cached_tokens))


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
