"""A running vLLM with or without kvcache, and how a scenario drives it step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

BLOCK = 32  # tokens
VOCABULARY = 1000
POISON = 0x40  # twice, it is 3.0 in bfloat16; four times, in float32
CONNECTOR = {
    "kv_connector": "KVCacheConnector",
    "kv_connector_module_path": "kvcache.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
Completion = dict[str, Any]
"""`tokens`; `logprobs`, the best three per token; `cached`, the number of cached prompt tokens."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of vLLM and of kvcache. Without `l1`, vLLM runs without kvcache."""

    checkpoint: str
    blocks: int  # of vLLM's own cache
    l1: str | None = None  # capacity
    budget: int = 256  # tokens per step
    context: int = 1024  # tokens
    options: dict[str, Any] = field(default_factory=dict)  # of vllm.LLM
    environment: dict[str, str] = field(default_factory=dict)
    stub_torchvision: bool = False  # where vLLM's module of the model imports it


class Engine:
    """A vLLM that runs.

    Properties that reach its scheduler and worker need `VLLM_ENABLE_V1_MULTIPROCESSING=0`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.settings = settings
        connector = {"kv_transfer_config": KVTransferConfig(**CONNECTOR)} if settings.l1 else {}
        arguments: dict[str, Any] = {
            "model": settings.checkpoint,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": settings.context,
            "max_num_batched_tokens": settings.budget,
            "num_gpu_blocks_override": settings.blocks,
            "kv_cache_memory_bytes": 64 << 20,  # required; vLLM allocates `blocks`
            "enable_prefix_caching": True,
            "disable_log_stats": False,
        }
        self.llm = LLM(**arguments | connector | settings.options)
        self.core = self.llm.llm_engine
        self._requests = 0

    # Internals

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.core.engine_core.engine_core.scheduler

    @property
    def has_kvcache(self) -> bool:
        return self.settings.l1 is not None

    @property
    def copying(self) -> bool:
        """Whether copies are in flight that only another step reports.

        A core in a process of its own makes these steps by itself.
        """
        in_process = hasattr(self.core.engine_core, "engine_core")
        return in_process and self.has_kvcache and bool(self.scheduler_side.copying)

    @property
    def scheduler_side(self) -> Any:
        """The connector's scheduler side; under a MultiConnector, that of its first connector."""
        connector = self.scheduler.connector
        own = getattr(connector, "_connectors", [connector])  # of vLLM 0.29
        [connector, *_] = getattr(connector, "sub_connectors", own)
        return connector.scheduler_side

    @property
    def worker_side(self) -> Any:
        """The connector's worker side."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker_side

    @property
    def stack(self) -> Any:
        """The stack of tiers."""
        return self.scheduler_side.stack

    @property
    def l1_stats(self) -> Any:
        return self.scheduler_side.stats().tiers[0]

    def held_in_l1(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each key whether L1 holds its block."""
        return list(self.stack.front.contains(keys))

    def request(self, name: str) -> Any:
        """Return the scheduler's object for an unfinished request."""
        [found] = [
            request for key, request in self.scheduler.requests.items() if key.startswith(name)
        ]
        return found

    def block_ids(self, name: str) -> list[int]:
        """Return the ids of the blocks in vLLM's own cache that a request has."""
        internal = self.request(name).request_id
        return list(self.scheduler.kv_cache_manager.get_block_ids(internal)[0])

    def page(self, layer: int, block: int) -> bytes:
        """Return the bytes of one page of vLLM's own cache."""
        import torch

        worker = self.core.engine_core.engine_core.model_executor.driver_worker.worker
        page = worker.model_runner.kv_caches[layer][block].contiguous()
        return bytes(page.view(torch.uint8).numpy().tobytes())

    @property
    def layers(self) -> int:
        worker = self.core.engine_core.engine_core.model_executor.driver_worker.worker
        return len(worker.model_runner.kv_caches)

    def open_state(self) -> dict[str, int]:
        """Return the sizes of all tables that are empty when no request is left."""
        sizes = self.scheduler_side.table_sizes()
        tables = {
            "promised": sizes["pending_loads"],
            "running": sizes["admitted"],
            "jobs": sizes["jobs"],
            "loads": sizes["unsent_loads"],
        }
        return tables | {"pinned": self.l1_stats.pinned_slots}

    def metric(self, name: str) -> float:
        """Return the sum of a vLLM counter over its labels."""
        found = [metric for metric in self.llm.get_metrics() if metric.name == name]
        return float(sum(metric.value for metric in found))

    # Requests

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        tokens: int = 8,
        salt: str | None = None,
        lora: str | None = None,
    ) -> None:
        """Queue a request for exactly `tokens` greedy tokens; `lora` is an adapter's folder."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        greedy = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=3, detokenize=False
        )
        salted = {"cache_salt": salt} if salt else {}
        adapter = LoRARequest(Path(lora).name, 1, lora) if lora else None
        inputs = {"prompt_token_ids": list(prompt), **salted}
        self.core.add_request(name, inputs, greedy, lora_request=adapter)

    def step(self) -> list[Any]:
        """Run one step of the engine; return its outputs."""
        return list(self.core.step())

    def drain(self) -> dict[str, Completion]:
        """Step until no request and no copy is left; return completions by request name."""
        completions: dict[str, Completion] = {}
        while self.core.has_unfinished_requests() or self.copying:
            for output in self.step():
                if output.finished:
                    completions[output.request_id] = _completion(output)
        return completions

    def abort(self, name: str) -> None:
        self.core.abort_request([name])

    def complete_all(
        self, prompts: Sequence[Sequence[int]], tokens: int = 8, **options: str | None
    ) -> list[Completion]:
        """Complete all `prompts` at once. `options` are `salt` and `lora` of every request."""
        names = []
        for prompt in prompts:
            self._requests += 1
            names.append(f"request{self._requests}")
            self.add(names[-1], prompt, tokens, **options)
        completions = self.drain()
        return [completions[name] for name in names]

    def complete(self, prompt: Sequence[int], tokens: int = 8, **options: str | None) -> Completion:
        """Complete one prompt while no other request runs."""
        [completion] = self.complete_all([prompt], tokens, **options)
        return completion

    # Caches

    def reset_all_caches(self) -> None:
        """Empty vLLM's own cache and kvcache. No request may be left."""
        assert not self.core.has_unfinished_requests()
        assert self.llm.reset_prefix_cache(reset_connector=True)

    def reset_own_cache(self) -> None:
        """Empty vLLM's own cache if kvcache is connected, so that kvcache must serve its blocks."""
        if self.has_kvcache:
            assert self.llm.reset_prefix_cache()

    def overwrite_own_cache(self) -> None:
        """Empty vLLM's own cache and overwrite its memory, if kvcache is connected.

        A block that kvcache does not load, or loads wrongly, then changes the completion.
        """
        self.reset_own_cache()
        if self.has_kvcache:
            executor = self.core.engine_core.engine_core.model_executor
            executor.collective_rpc(_overwrite_pages)

    @contextmanager
    def failing_copies(self, method: str, times: int = 1) -> Iterator[list[int]]:
        """Make the next `times` calls of `gather` or `scatter` raise.

        Yields the list to which each call appends its number of blocks.
        """
        copier = self.worker_side.copier
        original = getattr(copier, method)
        calls: list[int] = []

        def fail(*arguments: Any, **options: Any) -> Any:
            calls.append(len(arguments[0]))
            if len(calls) <= times:
                raise OSError("a copy that fails on purpose")
            return original(*arguments, **options)

        setattr(copier, method, fail)
        try:
            yield calls
        finally:
            delattr(copier, method)


def _overwrite_pages(worker: Any) -> None:
    """Overwrite all pages of a worker. Runs in every worker."""
    import torch

    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, (list, tuple)) else [cache]:
            every_byte = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            every_byte.fill_(POISON)


def prompt(name: str, length: int) -> list[int]:
    """Return `length` tokens that depend on `name` alone: the same in every process."""
    random = Random(name)
    return [random.randrange(VOCABULARY) for _ in range(length)]


def _completion(output: Any) -> Completion:
    [completion] = output.outputs
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            sorted([token, entry.logprob] for token, entry in position.items())
            for position in completion.logprobs
        ],
        "cached": output.num_cached_tokens,
    }
