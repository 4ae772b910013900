"""Run one vLLM in a process of its own, and play the demo's chats on it.

Every engine gets a new process, so that it has clean memory and its own environment. The process
sends one message through a pipe: the run, or the cause of its failure. vLLM prints to a log file.

The time to the first token is measured around vLLM's own steps: from before `add_request` to the
end of the `step` that returned the first token, on a monotonic clock, in the engine's process. It
includes the connector's copies of that step, and nothing outside the engine.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from kvcache.cli.demo.chats import Answer, Chats, ChatTurn
from kvcache.secrets import redact

BLOCK_TOKENS = 32


class EngineError(RuntimeError):
    """The engine did not start, or failed later. The message names its log."""


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """How to start an engine.

    Attributes:
        model: a folder, or a name in the local Hugging Face cache.
        context_tokens: the longest context.
        blocks: the size of the engine's own KV cache.
        l1_nbytes: the capacity of L1; None for an engine without kvcache.
    """

    model: str
    context_tokens: int
    blocks: int
    l1_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class L1Usage:
    """The state of L1 after the chats; all zero for an engine without kvcache."""

    hit_tokens: int = 0
    used_nbytes: int = 0
    capacity_nbytes: int = 0
    pinned_slots: int = 0


@dataclass(frozen=True, slots=True)
class EngineRun:
    """All turns of one engine. `block_nbytes` is one block of `BLOCK_TOKENS` in its KV cache."""

    turns: list[ChatTurn]
    block_nbytes: int
    l1: L1Usage


def play(setup: EngineSetup, chats: Chats) -> EngineRun:
    """Start an engine, play `chats` on it, and end it; it prints a dot on stderr for each turn.

    Raises:
        EngineError: the engine failed. Its log is kept only in this case.
    """
    handle, name = tempfile.mkstemp(prefix="kvcache-demo-", suffix=".log")
    os.close(handle)
    log = Path(name)
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run_process, args=(setup, chats, log, sender), name="vllm")
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        result = f"its process ended with code {process.exitcode}"
    except BaseException:
        process.terminate()
        log.unlink()
        raise
    finally:
        process.join()
        receiver.close()
    if isinstance(result, EngineRun):
        log.unlink()
        return result
    raise EngineError(f"the engine failed: {result}; its log is {log}")


def _run_process(setup: EngineSetup, chats: Chats, log: Path, sender: Connection) -> None:
    """The engine's process: send the `EngineRun`, or the cause of a failure as text."""
    terminal = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        set_environment(setup)
        sender.send(_play_here(setup, chats, terminal))
    except Exception as error:  # noqa: BLE001 - the other process raises it
        traceback.print_exc()
        sender.send(redact(f"{type(error).__name__}: {error}"))


def set_environment(setup: EngineSetup) -> None:
    """Set what vLLM and kvcache read at import: one process, no network, the profile."""
    for name in [name for name in os.environ if name.startswith("KVCACHE")]:
        del os.environ[name]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if setup.l1_nbytes is not None:
        os.environ["KVCACHE_PROFILE"] = "l1-only"
        os.environ["KVCACHE__L1__CAPACITY"] = str(setup.l1_nbytes)


def _play_here(setup: EngineSetup, chats: Chats, terminal: int) -> EngineRun:
    """Start an engine in this process and play `chats`; write a dot to `terminal` for each turn."""
    llm = start(setup)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    vocabulary = engine.model_config.get_vocab_size()

    # The first request of a process is slow. It shares no tokens with the chats.
    random = Random(f"warm-up {chats.seed}")
    warm_up = [random.randrange(vocabulary) for _ in range(chats.longest - chats.answer_tokens)]
    ask(engine, warm_up, chats.answer_tokens)

    before, turns = _l1_usage(scheduler), []
    for turn in chats.play(vocabulary, lambda prompt: ask(engine, prompt, chats.answer_tokens)):
        turns.append(turn)
        os.write(terminal, b".")
    after = _l1_usage(scheduler)

    config = scheduler.kv_cache_config
    block_nbytes = sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
    l1 = replace(after, hit_tokens=after.hit_tokens - before.hit_tokens)
    return EngineRun(turns, block_nbytes, l1)


def _l1_usage(scheduler: Any) -> L1Usage:
    stats = scheduler.connector.stats() if scheduler.connector else None
    if stats is None:  # no connector, or one that cannot keep blocks of this model
        return L1Usage()
    tier = stats.tiers[0]
    return L1Usage(
        hit_tokens=tier.hit_blocks * BLOCK_TOKENS,
        used_nbytes=tier.used_blocks * tier.block_nbytes,
        capacity_nbytes=tier.capacity_blocks * tier.block_nbytes,
        pinned_slots=tier.pinned_slots,
    )


def start(setup: EngineSetup) -> Any:
    """Return a `vllm.LLM` for `setup`."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    options: dict[str, Any] = {}
    if setup.l1_nbytes is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="KVCacheConnector",
            kv_connector_module_path="kvcache.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )
    if current_platform.is_cpu():
        # Without a size, vLLM on CPU requires most of the host's memory to be free. The value does
        # not matter: `num_gpu_blocks_override` determines what vLLM allocates.
        options["kv_cache_memory_bytes"] = 1 << 20
        import torch

        options["dtype"] = cpu_dtype(torch.backends.cpu.get_cpu_capability())
    return LLM(
        model=setup.model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=BLOCK_TOKENS,
        max_model_len=setup.context_tokens,
        num_gpu_blocks_override=setup.blocks,
        enable_prefix_caching=True,
        **options,
    )


def cpu_dtype(capability: str) -> str:
    """Return the dtype to compute in on a CPU with this PyTorch `capability`, such as "AVX2".

    Without instructions for bfloat16, PyTorch multiplies one number at a time: on AVX2, that is
    five times slower than float32.
    """
    return "auto" if capability.startswith("AVX512") else "float32"


def ask(engine: Any, prompt: list[int], tokens: int) -> Answer:
    """Send one request to an idle engine; return `tokens` greedy tokens, with their logprobs."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False
    )
    begin = time.perf_counter()
    engine.add_request("turn", {"prompt_token_ids": prompt}, greedy)
    arrivals: list[tuple[float, Any]] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        arrivals += [(time.perf_counter() - begin, output) for output in outputs]
    (ttft_s, _), *_, (_, last) = arrivals
    completion = last.outputs[0]
    return Answer(
        tokens=list(completion.token_ids),
        logprobs=[
            sorted((token, entry.logprob) for token, entry in position.items())
            for position in completion.logprobs
        ],
        cached_tokens=last.num_cached_tokens,
        ttft_s=ttft_s,
    )
