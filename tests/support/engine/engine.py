"""A running vLLM, and how scenarios drive it step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

BLOCK = 32  # tokens
VOCABULARY = 1000
CONNECTOR = {
    "kv_connector": "KVCacheConnector",
    "kv_connector_module_path": "kvcache.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
Answer = dict[str, Any]  # tokens, logprobs (per token, its best three), cached (prompt tokens)


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine: `blocks` of its own cache, `l1` for kvcache (a size), None for no connector."""

    checkpoint: str
    blocks: int
    l1: str | None = None
    budget: int = 256  # tokens of a step
    context: int = 1024
    options: dict[str, Any] = field(default_factory=dict)  # of vllm.LLM
    environment: dict[str, str] = field(default_factory=dict)


class Engine:
    """A running vLLM. With its core in this process, `scheduler` and `side` are within reach."""

    def __init__(self, setup: Setup) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.setup = setup
        connector = {"kv_transfer_config": KVTransferConfig(**CONNECTOR)} if setup.l1 else {}
        settings: dict[str, Any] = {
            "model": setup.checkpoint,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": setup.context,
            "max_num_batched_tokens": setup.budget,
            "num_gpu_blocks_override": setup.blocks,
            "kv_cache_memory_bytes": 64 << 20,  # what is allocated is `blocks`
            "enable_prefix_caching": True,
            "disable_log_stats": False,
        }
        self.llm = LLM(**settings | connector | setup.options)
        self.core = self.llm.llm_engine
        self._asked = 0

    # Inside

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.core.engine_core.engine_core.scheduler

    @property
    def keeps(self) -> bool:
        """Whether kvcache is connected."""
        return self.setup.l1 is not None

    @property
    def copying(self) -> bool:
        """Whether copies go on that only another step hears of; elsewhere vLLM steps by itself."""
        here = hasattr(self.core.engine_core, "engine_core")
        return here and self.keeps and bool(self.side.copying)

    @property
    def side(self) -> Any:
        """The connector's half in the scheduler; the first one's of a MultiConnector."""
        connector = self.scheduler.connector
        [connector, *_] = getattr(connector, "sub_connectors", [connector])
        return connector.scheduler_side

    @property
    def worker(self) -> Any:
        """The connector's half in the worker, where that is this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker_side

    @property
    def l1(self) -> Any:
        """Counts of the DRAM tier."""
        return self.side.stats().tiers[0]

    def held(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of `keys` L1 holds."""
        return list(self.side.stack.front.contains(keys))

    def request(self, name: str) -> Any:
        """The scheduler's request of this name, while it is there."""
        [found] = [
            request for key, request in self.scheduler.requests.items() if key.startswith(name)
        ]
        return found

    def blocks(self, name: str) -> list[int]:
        """The numbers of the engine's blocks that a request has."""
        internal = self.request(name).request_id
        return list(self.scheduler.kv_cache_manager.get_block_ids(internal)[0])

    def page(self, layer: int, block: int) -> bytes:
        """The bytes of one page, read from vLLM's own tensor."""
        import torch

        worker = self.core.engine_core.engine_core.model_executor.driver_worker.worker
        page = worker.model_runner.kv_caches[layer][block].contiguous()
        return bytes(page.view(torch.uint8).numpy().tobytes())

    @property
    def layers(self) -> int:
        worker = self.core.engine_core.engine_core.model_executor.driver_worker.worker
        return len(worker.model_runner.kv_caches)

    def open_ends(self) -> dict[str, int]:
        """What must be nothing when no request is left."""
        sizes = self.side.table_sizes()
        tables = {
            "promised": sizes["pending_loads"],
            "running": sizes["admitted"],
            "jobs": sizes["jobs"],
            "loads": sizes["unsent_loads"],
        }
        return tables | {"pinned": self.l1.pinned_slots}

    def metric(self, name: str) -> float:
        """A counter of vLLM, as its users see it."""
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
        asked = {"prompt_token_ids": list(prompt), **salted}
        self.core.add_request(name, asked, greedy, lora_request=adapter)

    def step(self) -> list[Any]:
        """One step of the engine; the outputs that came of it."""
        return list(self.core.step())

    def drain(self) -> dict[str, Answer]:
        """Step until no request is left, and no copy goes on; the answers by name."""
        answers: dict[str, Answer] = {}
        while self.core.has_unfinished_requests() or self.copying:
            for output in self.step():
                if output.finished:
                    answers[output.request_id] = _answer(output)
        return answers

    def abort(self, name: str) -> None:
        self.core.abort_request([name])

    def together(
        self, prompts: Sequence[Sequence[int]], tokens: int = 8, **whose: str | None
    ) -> list[Answer]:
        """Ask all `prompts` at once, of one `salt` or `lora`."""
        names = []
        for prompt in prompts:
            self._asked += 1
            names.append(f"asked{self._asked}")
            self.add(names[-1], prompt, tokens, **whose)
        answers = self.drain()
        return [answers[name] for name in names]

    def ask(self, prompt: Sequence[int], tokens: int = 8, **whose: str | None) -> Answer:
        """Ask one prompt alone."""
        [answer] = self.together([prompt], tokens, **whose)
        return answer

    # Caches

    def fresh(self) -> None:
        """No request, nothing in any cache."""
        assert not self.core.has_unfinished_requests()
        assert self.llm.reset_prefix_cache(reset_connector=True)

    def evict_own(self) -> None:
        """Empty the engine's own cache, where kvcache has what was in it."""
        if self.keeps:
            assert self.llm.reset_prefix_cache()

    @contextmanager
    def failing(self, copy: str, times: int = 1) -> Iterator[list[int]]:
        """The next `times` copies of this kind (`gather` or `scatter`) raise; counts the calls."""
        copier = self.worker.copier
        original = getattr(copier, copy)
        calls: list[int] = []

        def fails(*arguments: Any, **options: Any) -> Any:
            calls.append(len(arguments[0]))
            if len(calls) <= times:
                raise OSError("a copy that fails on purpose")
            return original(*arguments, **options)

        setattr(copier, copy, fails)
        try:
            yield calls
        finally:
            delattr(copier, copy)


def prompt(name: str, length: int) -> list[int]:
    """The `length` tokens of this name: others for every name, the same in every process."""
    random = Random(name)
    return [random.randrange(VOCABULARY) for _ in range(length)]


def _answer(output: Any) -> Answer:
    [completion] = output.outputs
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            sorted([token, entry.logprob] for token, entry in position.items())
            for position in completion.logprobs
        ],
        "cached": output.num_cached_tokens,
    }
