"""An engine and its workers, played by hand: two ranks, blocks of 32 tokens, a real L1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.messages import Acks, Shard, Step, Transfer
from kvcache.connectors.vllm.scheduler import SchedulerSide

BLOCK = 32
SHARD = 4096
RANKS = ((0, 0), (0, 1))


def full_attention() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)


def engine_config(
    world: int = 2, device: str = "cpu", *, ahead: bool | int = False, **parallel: int
) -> Any:
    """What the connector reads of vLLM's config. This engine can resume a prompt.

    `ahead`: it builds a step before the one before it is reported.
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


def cache_config(*specs: Any, hash_block_size: int | None = None) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"]) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=64, hash_block_size=hash_block_size)


def shards(host: str | None = None) -> dict[tuple[int, int], Shard]:
    return {rank: Shard(SHARD, host or host_name(), "form") for rank in RANKS}


def chain(name: str, tokens: int, granule: int = BLOCK) -> list[bytes]:
    return [f"{name}/{n}".encode() for n in range(tokens // granule)]


@dataclass
class Request:
    """What the connector reads of a vLLM request. `tokens` of it are known."""

    request_id: str
    num_tokens: int
    name: str = ""  # of its chain of hashes: equal names are equal prompts
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    granule: int = BLOCK
    blocks: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 1 << 30
    trace_headers: dict[str, str] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    lora_request: Any = None

    @property
    def block_hashes(self) -> list[bytes]:
        return chain(self.name or self.request_id, self.num_tokens, self.granule)


class Played:
    """An engine whose every step is written out; block numbers are given by the test."""

    def __init__(self, side: SchedulerSide) -> None:
        self.side = side
        self._new: list[Request] = []
        self._resumed: list[Request] = []

    def admit(
        self, request: Request, blocks: Sequence[int], *, own: int = 0, resumed: bool = False
    ) -> int:
        """Look up, admit with `own` tokens in the engine's cache; give the tokens promised."""
        tokens = self.side.matched_tokens(request, own)
        assert tokens is not None
        request.blocks = list(blocks)
        self.side.admitted(request, (request.blocks,), tokens)
        request.num_computed_tokens = own + tokens
        (self._resumed if resumed else self._new).append(request)
        return tokens

    def step(
        self, *scheduled: tuple[Request, int], more: dict[str, list[int]] | None = None
    ) -> Step:
        """Schedule these; `more` are blocks that running requests get."""
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
        step = self.side.step(output)
        assert step is not None
        self._new, self._resumed = [], []
        for request, tokens in scheduled:
            request.num_computed_tokens += tokens
        return step

    def ack(self, *transfers: Transfer, failed: bool = False, ranks: int = 2) -> None:
        """`ranks` ranks are through with these."""
        jobs = {transfer.job for transfer in transfers}
        self.side.acked(Acks(dict.fromkeys(jobs, ranks), jobs if failed else set()))

    def keep(self, request: Request, blocks: Sequence[int]) -> Step:
        """Compute all of `request` in one step that succeeds, and finish it."""
        self.admit(request, blocks)
        step = self.step((request, request.num_tokens - request.num_computed_tokens))
        self.ack(*step.loads, *step.stores)
        self.side.finished(request)
        return step

    @property
    def l1(self) -> Any:
        stats = self.side.stats()
        assert stats is not None
        return stats.tiers[0]

    def held(self, request: Request) -> list[bool]:
        stack = self.side._stack
        assert stack is not None
        return stack.front.contains(request.block_hashes)

    def nothing_is_open(self) -> bool:
        side = self.side
        return not (
            side._promised or side._running or side._jobs or side._loads or self.l1.pinned_slots
        )


def opened(
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
    hash_block_size: int | None = None,
    *,
    ahead: bool = False,
) -> Played:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(slots * SHARD * len(RANKS)))
    cache = cache_config(full_attention(), hash_block_size=hash_block_size)
    side = SchedulerSide(engine_config(ahead=ahead), cache, {})
    side.open(shards())
    assert side._stack is not None
    side._stack.front.slab.wait_populated()
    return Played(side)
