"""An engine with steps that a test writes out: two ranks, blocks of 32 tokens, a real L1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache import Stack
from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.messages import Acks, Shard, Step, Transfer
from kvcache.connectors.vllm.scheduler.side import SchedulerSide

BLOCK = 32  # tokens
SHARD = 4096  # bytes
RANKS = ((0, 0), (0, 1))


def full_attention() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)


def engine_config(
    world: int = 2, device: str = "cpu", *, ahead: bool | int = False, **parallel: int
) -> Any:
    """What the connector reads of vLLM's config, of an engine that can resume a prompt.

    `ahead`: the engine builds a step before the one before it is reported.
    """
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            world_size=world, **{"data_parallel_size": 1, "data_parallel_size_local": 1} | parallel
        ),
        model_config=SimpleNamespace(served_model_name="model", is_prefix_caching_supported=True),
        cache_config=SimpleNamespace(enable_prefix_caching=True, prefix_match_unit=None),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True, async_scheduling=ahead),
        device_config=SimpleNamespace(device_type=device),
    )


def cache_config(
    *specs: Any, hash_block_size: int | None = None, layers: Sequence[str] = ("layer",)
) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=[*layers]) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=64, hash_block_size=hash_block_size)


def shards(host: str | None = None, *, async_copies: bool = False) -> dict[tuple[int, int], Shard]:
    return {
        rank: Shard((SHARD,), host or host_name(), "form", async_copies=async_copies)
        for rank in RANKS
    }


def chain(name: str, tokens: int, hash_tokens: int = BLOCK) -> list[bytes]:
    return [f"{name}/{n}".encode() for n in range(tokens // hash_tokens)]


@dataclass
class Request:
    """What the connector reads of a vLLM request. The first `num_tokens` tokens are known."""

    request_id: str
    num_tokens: int
    name: str = ""  # of its chain of hashes: equal names are equal prompts
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    hash_tokens: int = BLOCK
    blocks: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 1 << 30
    trace_headers: dict[str, str] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    lora_request: Any = None

    @property
    def block_hashes(self) -> list[bytes]:
        return chain(self.name or self.request_id, self.num_tokens, self.hash_tokens)


class PlayedEngine:
    """An engine with block numbers and steps that a test chooses."""

    def __init__(self, side: SchedulerSide) -> None:
        self.side = side
        self._new: list[Request] = []
        self._resumed: list[Request] = []

    def admit(
        self,
        request: Request,
        blocks: Sequence[int],
        *,
        own: int = 0,
        resumed: bool = False,
        scheduled: bool = True,
    ) -> int:
        """Look up and admit a request that has `own` tokens in the engine's cache.

        `scheduled` is false for one that waits for its async load. Returns the tokens found.
        """
        tokens = self.side.matched_tokens(request, own)
        assert tokens is not None
        request.blocks = list(blocks)
        self.side.admit(request, (request.blocks,), tokens)
        request.num_computed_tokens = own + tokens
        if scheduled:
            self.schedule(request, resumed=resumed)
        return tokens

    def schedule(self, request: Request, *, resumed: bool = False) -> None:
        """Have the next step know the request as new, or as resumed after a preemption."""
        (self._resumed if resumed else self._new).append(request)

    def readmit(self, request: Request, tokens: int = 0) -> None:
        """Admit and schedule a request that has its blocks; `tokens` are of its pending load."""
        self.side.admit(request, (request.blocks,), tokens)
        self.schedule(request)

    def step(
        self, *scheduled: tuple[Request, int], more: dict[str, list[int]] | None = None
    ) -> Step:
        """Build a step that computes so many tokens; `more` are blocks for running requests."""
        more = more or {}
        running = [r for r, _ in scheduled if r not in self._new and r not in self._resumed]
        cached = [*running, *self._resumed]
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, block_ids=(r.blocks,)) for r in self._new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r in cached],
                new_block_ids=[
                    (r.blocks,)
                    if r in self._resumed
                    else ((more[r.request_id],) if r.request_id in more else None)
                    for r in cached
                ],
                resumed_req_ids={r.request_id for r in self._resumed},
            ),
            num_scheduled_tokens={r.request_id: tokens for r, tokens in scheduled},
        )
        step = self.side.build_step(output)
        assert step is not None
        self._new, self._resumed = [], []
        for request, tokens in scheduled:
            request.num_computed_tokens += tokens
        return step

    def ack(
        self, *transfers: Transfer, failed: bool = False, ranks: int = 2, seconds: float = 0.0
    ) -> None:
        """Have `ranks` ranks acknowledge these, each after a copy of so many seconds."""
        jobs = {transfer.job for transfer in transfers}
        took = dict.fromkeys(jobs, seconds) if seconds else {}
        acks = dict.fromkeys(jobs, ranks)
        self.side.end_step(Acks(acks, jobs if failed else set(), seconds=took))

    def keep(self, request: Request, blocks: Sequence[int], *, load_s: float = 0.0) -> Step:
        """Compute all of `request` in one step that succeeds, and finish it.

        `load_s`: seconds that its load takes.
        """
        self.admit(request, blocks)
        step = self.step((request, request.num_tokens - request.num_computed_tokens))
        self.ack(*step.loads, seconds=load_s)
        self.ack(*step.stores)
        self.side.finish(request)
        return step

    @property
    def stack(self) -> Stack:
        assert self.side.stack is not None
        return self.side.stack

    @property
    def l1(self) -> Any:
        return self.stack.stats().tiers[0]

    def held(self, request: Request) -> list[bool]:
        return self.stack.front.contains(request.block_hashes)

    def is_idle(self) -> bool:
        """Whether nothing is kept for a request, no job is under way and nothing is pinned."""
        return not (self.side.requests or self.side.copying or self.l1.pinned_slots)


def opened(
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
    hash_block_size: int | None = None,
    *,
    ahead: bool = False,
    async_copies: bool = False,
    identity: Mapping[str, object] | None = None,
    **arguments: Any,
) -> PlayedEngine:
    """Return an engine with an L1 of so many slots; `arguments` are for its `SchedulerSide`."""
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(slots * SHARD * len(RANKS)))
    cache = cache_config(full_attention(), hash_block_size=hash_block_size)
    side = SchedulerSide(engine_config(ahead=ahead), cache, identity or {}, **arguments)
    side.open(shards(async_copies=async_copies))
    engine = PlayedEngine(side)
    engine.stack.front.slab.wait_populated()
    return engine
