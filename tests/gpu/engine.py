"""Runs a real vLLM with kvcache, and compares it with the same vLLM without it.

Run `python tests/gpu/engine.py`. It writes a checkpoint with random weights of normal scale, needs
no network, and takes less than two minutes on a GPU. It prints a table in Markdown, with a column
for each of vLLM's model runners. On a CPU it rehearses with a smaller model and the first runner.

Each runner has one engine, in a process of its own. The script measures without kvcache by
detaching the connector from that engine: two processes differ by several per cent for all their
life, because of the placement of their memory. The exit code is 1 if a token differs, a hit is
missed, or, on a GPU, the engine loses more than half a per cent without hits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvcache.cli.demo import checkpoint
from kvcache.cli.demo import engine as demo

MAX_LOSS = 0.005  # of the engine's speed, without hits
RUNNERS = {"0": "vLLM's first model runner", "1": "vLLM's second model runner"}
LOG_TAIL = 6000  # characters of the log of a failed engine


@dataclass(frozen=True)
class Plan:
    """What an engine computes.

    Attributes:
        prompts: how many prompts are hit, one after another; prompt_tokens is the length of each.
        batch: how many new prompts run at once, each of batch_tokens tokens.
        pairs: how many pairs of such batches are compared, with kvcache and without it.
        answer: tokens of each answer.
        l1_nbytes: the capacity of L1.
        model: arguments of `checkpoint.write`.
    """

    prompts: int
    prompt_tokens: int
    batch: int
    batch_tokens: int
    pairs: int
    answer: int
    l1_nbytes: int
    model: dict[str, int]

    @property
    def context(self) -> int:
        return max(self.prompt_tokens, self.batch_tokens) + self.answer

    @property
    def blocks(self) -> int:
        """The size of vLLM's own cache: room for what runs at once, and for a prompt's hit."""
        tokens = self.batch * (self.batch_tokens + self.answer) + 2 * self.context
        return tokens // demo.BLOCK_TOKENS + 2 * self.batch


GPU_PLAN = Plan(
    prompts=8, prompt_tokens=8192, batch=8, batch_tokens=2048, pairs=20, answer=16,
    l1_nbytes=6 << 30,
    model={"layers": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 4096, "positions": 16384},
)  # fmt: skip
CPU_PLAN = Plan(
    prompts=3, prompt_tokens=512, batch=2, batch_tokens=256, pairs=4, answer=8,
    l1_nbytes=128 << 20, model={"layers": 4, "positions": 1024},
)  # fmt: skip


class ConnectedEngine:
    """A vLLM with kvcache, from which the connector can be detached between requests."""

    def __init__(self, setup: demo.EngineSetup) -> None:
        from vllm.distributed.kv_transfer import kv_transfer_state

        self.llm = demo.start(setup)
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._transfer = kv_transfer_state
        self._attached = (
            self._scheduler.connector,
            kv_transfer_state._KV_CONNECTOR_AGENT,
            getattr(self._runner, "kv_connector", None),
        )

    @property
    def stats(self) -> Any:
        """The counts of L1."""
        return self._attached[0].stats().tiers[0]

    def attach(self, attached: bool) -> None:
        """Attach or detach the connector. No request may be left."""
        self.wait_for_copies()
        parts = self._attached
        if not attached:
            parts = (None, None, None)
            if self._attached[2] is not None:
                from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR

                parts = (None, None, NO_OP_KV_CONNECTOR)
        self._scheduler.connector, self._transfer._KV_CONNECTOR_AGENT, second = parts
        if second is not None:  # the second runner keeps its own reference
            self._runner.kv_connector = second

    def wait_for_copies(self) -> None:
        """Step until no copy is in flight."""
        while self._scheduler.connector and self._scheduler.connector.scheduler_side.copying:
            self.engine.step()

    def ask(self, prompt: list[int], tokens: int) -> Any:
        """Complete one prompt, and wait for its stores."""
        answer = demo.ask(self.engine, prompt, tokens)
        self.wait_for_copies()
        return answer

    def forget(self) -> None:
        """Empty vLLM's own cache."""
        assert self.llm.reset_prefix_cache()

    def seconds(self, prompts: Sequence[list[int]], tokens: int) -> float:
        """Return how long vLLM takes for these prompts at once."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self.engine.add_request(f"batch{number}", {"prompt_token_ids": prompt}, greedy)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                assert not output.num_cached_tokens, "a new prompt hit"
        return time.perf_counter() - begin


def compare(engine: ConnectedEngine, plan: Plan, vocabulary: int) -> dict[str, Any]:
    """Return tokens, hits, times to the first token, and the loss without hits."""
    random = Random(0)

    def prompt(tokens: int) -> list[int]:
        return [random.randrange(vocabulary) for _ in range(tokens)]

    engine.ask(first := prompt(plan.prompt_tokens), plan.answer)  # compiles what a store needs
    engine.forget()
    engine.ask(first, plan.answer)  # and a load

    prompts = [prompt(plan.prompt_tokens) for _ in range(plan.prompts)]
    found: dict[str, list[Any]] = {"computed": [], "own": [], "restored": []}
    engine.attach(False)
    without = [engine.ask(each, plan.answer) for each in prompts]
    engine.forget()
    engine.attach(True)
    for each in prompts:
        found["computed"].append(engine.ask(each, plan.answer))
        found["own"].append(engine.ask(each, plan.answer))
    engine.forget()
    for each in prompts:
        found["restored"].append(engine.ask(each, plan.answer))
    engine.forget()

    ratios = []
    for pair in range(plan.pairs + 1):
        spent = {}
        for attached in (True, False) if pair % 2 else (False, True):
            engine.attach(attached)
            batch = [prompt(plan.batch_tokens) for _ in range(plan.batch)]
            spent[attached] = engine.seconds(batch, plan.answer)
        if pair:  # the first pair warms up
            ratios.append(spent[True] / spent[False])
    engine.attach(True)
    return {
        "equal": {
            name: sum(a.tokens == b.tokens for a, b in zip(answers, without, strict=True))
            for name, answers in found.items()
        },
        "cached": [answer.cached_tokens for answer in found["restored"]],
        "ttft_ms": {
            name: statistics.median(answer.ttft_s for answer in answers) * 1e3
            for name, answers in {"without": without, **found}.items()
        },
        "loss": [ratio - 1 for ratio in statistics.quantiles(ratios, n=4)],
        "pinned_slots": engine.stats.pinned_slots,
    }


def run_engine(plan: Plan, model: str, runner: str, log: Path, pipe: Connection) -> None:
    """The engine's process: send what `compare` returns, or the cause of a failure as text."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        setup = demo.EngineSetup(model, plan.context, plan.blocks, plan.l1_nbytes)
        demo.set_environment(setup)
        os.environ |= {
            "VLLM_USE_V2_MODEL_RUNNER": runner,
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # which compiles at first use
            "KVCACHE__L1__WAIT_PINNED": "true",
        }
        engine = ConnectedEngine(setup)
        vocabulary = engine.engine.model_config.get_vocab_size()
        pipe.send(compare(engine, plan, vocabulary))
    except Exception as error:  # noqa: BLE001 - the other process prints it
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")


def measure(plan: Plan, model: str, runner: str, log: Path) -> dict[str, Any]:
    """Run one engine in a process of its own.

    Raises:
        RuntimeError: the engine failed; the message ends with its log.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=run_engine, args=(plan, model, runner, log, sender))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] | str = receiver.recv()
    except EOFError:
        result = "its process ended"
    process.join()
    if isinstance(result, str):
        output = log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{RUNNERS[runner]} failed: {result}\n{output[-LOG_TAIL:]}")
    return result


def print_table(plan: Plan, results: dict[str, dict[str, Any]]) -> None:
    """Print what was found, with a column for each runner."""

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        print(f"| {name} |", " | ".join(map(cell, results.values())), "|")

    def ttft(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda result: f"{result['ttft_ms'][name]:.2f} ms"

    print("|  |", " | ".join(RUNNERS[runner] for runner in results), "|")
    print("|---|" + "---|" * len(results))
    for name, title in (
        ("computed", "computed with kvcache"),
        ("own", "hits in vLLM's own cache"),
        ("restored", "hits in L1"),
    ):
        row(
            f"answers as without kvcache: {title}",
            lambda result: f"{result['equal'][name]} of {plan.prompts}",  # noqa: B023
        )
    row(
        f"hit in L1, of {plan.prompt_tokens} tokens",
        lambda result: f"{min(result['cached'])} to {max(result['cached'])}",
    )
    row("first token, computed without kvcache", ttft("without"))
    row("first token, computed with kvcache", ttft("computed"))
    row("first token, hit in vLLM's own cache", ttft("own"))
    row("first token, hit in L1", ttft("restored"))
    row(
        f"time added without hits, quartiles of {plan.pairs} pairs of batches",
        lambda result: ", ".join(f"{loss:+.2%}" for loss in result["loss"]),
    )
    row("slots pinned at the end", lambda result: str(result["pinned_slots"]))


def problems(plan: Plan, results: dict[str, dict[str, Any]], gpu: bool) -> list[str]:
    """Return what is wrong."""
    found = []
    for runner, result in results.items():
        name = RUNNERS[runner]
        # vLLM computes at least the last token of a prompt, so a hit lacks up to one block.
        least = plan.prompt_tokens - demo.BLOCK_TOKENS
        found += [
            f"{name}: {plan.prompts - equal} answers differ: {kind}"
            for kind, equal in result["equal"].items()
            if equal < plan.prompts
        ]
        if min(result["cached"]) < least:
            found.append(f"{name}: hits of {result['cached']} tokens; at least {least} expected")
        if gpu and result["loss"][1] > MAX_LOSS:
            found.append(f"{name}: {result['loss'][1]:.2%} lost without hits; at most 0.5 %")
        if result["pinned_slots"]:
            found.append(f"{name}: {result['pinned_slots']} slots are still pinned")
    return found


def main() -> int:
    """Measure, print the table and the problems; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU if there is one")
    parser.add_argument("--runner", choices=RUNNERS, help="one of vLLM's model runners (both)")
    args = parser.parse_args()

    import torch
    import vllm

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    plan = GPU_PLAN if gpu else CPU_PLAN
    runners = [args.runner] if args.runner else list(RUNNERS) if gpu else ["0"]
    name = torch.cuda.get_device_name(0) if gpu else f"CPU ({platform.machine()})"
    print(f"{name}, vLLM {vllm.__version__}, torch {torch.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = str(checkpoint.write(Path(folder, "model"), **plan.model))
        results = {runner: measure(plan, model, runner, Path(folder, "log")) for runner in runners}
    print_table(plan, results)
    for problem in (found := problems(plan, results, gpu)):
        print("\nFAIL:", problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
