"""One vLLM in a process of its own, playing the demo's chats.

Every engine gets a fresh process: clean memory, its own environment, nothing warm from the engine
before it. Turns come back through a pipe as they end; whatever vLLM prints goes to a log file.

The time to the first token is taken around vLLM's own steps: from before `add_request` to the end
of the `step` that returned the first token, on a monotonic clock, in the engine's process. Nothing
runs between the two but the engine, and the connector's copies of that step are inside.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from kvcache.cli.demo.chats import Answer, Chats, ChatTurn
from kvcache.secrets import redact

BLOCK_TOKENS = 32


class EngineError(RuntimeError):
    """The engine did not start, or died on the way. The message names the log."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How to start an engine: `blocks` is the size of its own KV cache.

    `l1_nbytes` is the DRAM given to kvcache, or None for an engine without it.
    """

    model: str
    context_tokens: int
    blocks: int
    l1_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class L1:
    """What the DRAM tier had to say after the chats; all zero for an engine without kvcache."""

    hit_tokens: int = 0
    used_nbytes: int = 0
    capacity_nbytes: int = 0
    pinned_slots: int = 0


@dataclass(frozen=True, slots=True)
class EngineRun:
    """All turns of one engine. `block_nbytes` is one block of `BLOCK_TOKENS` in its KV cache."""

    turns: list[ChatTurn]
    block_nbytes: int
    l1: L1


def play(setup: Setup, chats: Chats, heard: Callable[[ChatTurn], None]) -> EngineRun:
    """Start the engine, play `chats`, end it. `heard` is called with every turn as it ends.

    Raises `EngineError` when the engine does not get to the end; only then its log is kept.
    """
    handle, name = tempfile.mkstemp(prefix="kvcache-demo-", suffix=".log")
    os.close(handle)
    log = Path(name)
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_engine, args=(setup, chats, log, sender), name="vllm")
    process.start()
    sender.close()
    turns: list[ChatTurn] = []
    try:
        while isinstance(message := receiver.recv(), ChatTurn):
            turns.append(message)
            heard(message)
    except EOFError:
        process.join()
        message = f"its process ended with code {process.exitcode}"
    except BaseException:
        process.terminate()
        log.unlink()
        raise
    finally:
        process.join()
        receiver.close()
    if isinstance(message, str):
        raise EngineError(f"the engine failed: {message}; all it said is in {log}")
    log.unlink()
    block_nbytes, l1 = message
    return EngineRun(turns, block_nbytes, l1)


def _engine(setup: Setup, chats: Chats, log: Path, sender: Connection) -> None:
    """The engine's process: sends every `ChatTurn`, then (block bytes, L1) or what went wrong."""
    with log.open("wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        _set_environment(setup)
        _converse(setup, chats, sender)
    except Exception as error:  # noqa: BLE001 - the other process says it
        traceback.print_exc()
        sender.send(redact(f"{type(error).__name__}: {error}"))


def _set_environment(setup: Setup) -> None:
    """Settings that vLLM and kvcache read at import: one process, no network, our profile."""
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


def _converse(setup: Setup, chats: Chats, sender: Connection) -> None:
    llm = _start(setup)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    vocabulary = engine.model_config.get_vocab_size()

    # The first request pays for what every process pays once; none of its tokens are the chats'.
    random = Random(f"warm-up {chats.seed}")
    warm_up = [random.randrange(vocabulary) for _ in range(chats.longest - chats.answer_tokens)]
    _ask(engine, warm_up, chats.answer_tokens)

    before = _l1(scheduler)
    for turn in chats.play(vocabulary, lambda prompt: _ask(engine, prompt, chats.answer_tokens)):
        sender.send(turn)
    after = _l1(scheduler)

    config = scheduler.kv_cache_config
    block_nbytes = sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
    sender.send((block_nbytes, replace(after, hit_tokens=after.hit_tokens - before.hit_tokens)))


def _l1(scheduler: Any) -> L1:
    stats = scheduler.connector.stats() if scheduler.connector else None
    if stats is None:  # no connector, or one that can keep nothing of this model
        return L1()
    tier = stats.tiers[0]
    return L1(
        hit_tokens=tier.hit_blocks * BLOCK_TOKENS,
        used_nbytes=tier.used_blocks * tier.block_nbytes,
        capacity_nbytes=tier.capacity_blocks * tier.block_nbytes,
        pinned_slots=tier.pinned_slots,
    )


def _start(setup: Setup) -> Any:
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
        # Without a size, vLLM on CPU takes most of the host's memory, and refuses to start where
        # that is not free. Any size will do: `num_gpu_blocks_override` says what is allocated.
        options["kv_cache_memory_bytes"] = 1 << 20
        options["dtype"] = cpu_dtype()
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


def cpu_dtype() -> str:
    """What to compute in on this CPU. Where it lacks instructions for bfloat16, PyTorch multiplies
    one number at a time: on AVX2, five times slower than in float32."""
    import torch

    return "auto" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "float32"


def _ask(engine: Any, prompt: list[int], tokens: int) -> Answer:
    """One request, alone in the engine: exactly `tokens` greedy tokens, with their logprobs."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False
    )
    start = time.perf_counter()
    engine.add_request("turn", {"prompt_token_ids": prompt}, greedy)
    arrivals: list[tuple[float, Any]] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        arrivals += [(time.perf_counter() - start, output) for output in outputs]
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
