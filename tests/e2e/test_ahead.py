"""vLLM's async scheduler with the connector: it builds a step before the last one is reported.

vLLM turns async scheduling off on a CPU, so the scheduler is real here and the model is simulated:
it computes the hash of a block, or WRONG if a block before it is WRONG. The slots are those of L1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.compat import host_name
from kvcache.connectors.vllm.messages import Acks, Shard, Step
from tests.support.engine.engine import BLOCK, CONNECTOR, prompt

pytestmark = pytest.mark.engine

BLOCKS, NBYTES, WRONG = 64, 4096, b"\xff" * 32


class AsyncScheduling:
    """vLLM's scheduler and a simulated model. If `fails` is set, the next load fails."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        arguments: dict[str, Any] = {
            "model": str(checkpoint), "skip_tokenizer_init": True, "block_size": BLOCK,
            "max_model_len": 1024, "max_num_batched_tokens": 8 * BLOCK,
            "kv_transfer_config": CONNECTOR,
        }  # fmt: skip
        config = EngineArgs(**arguments).create_engine_config()
        config.scheduler_config.async_scheduling = True
        config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
        )
        cache = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        with set_current_vllm_config(config):
            self.scheduler = AsyncScheduler(
                config, cache, StructuredOutputManager(config), BLOCK, log_stats=True
            )
        self.connector: Any = self.scheduler.connector
        self.connector.set_xfer_handshake_metadata_pp_aware(
            {(0, 0): Shard((NBYTES,), host_name(), "form")}
        )
        self.side = self.connector.scheduler_side
        self.front = self.side.stack.front
        self.front.slab.wait_populated()
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.fails = False
        self.kv: list[bytes] = [b""] * BLOCKS
        self.reports: deque[tuple[Any, Any]] = deque()

    def add(self, name: str, tokens: list[int], answer: int = 4) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
        sampling.update_from_generation_config({}, None)
        request = Request(name, tokens, sampling, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        """Build and run a step, then report the one before it."""
        output = self.scheduler.schedule()
        self.reports.append((output, self._run(output)))
        if len(self.reports) > 1:
            self.report()

    def report(self) -> None:
        self.scheduler.update_from_output(*self.reports.popleft())

    def drain(self) -> None:
        while self.scheduler.has_requests() or self.side.copying or self.reports:
            self.step()
            if not self.scheduler.has_requests():
                while self.reports:
                    self.report()

    def _run(self, output: Any) -> Any:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        step: Step = output.kv_connector_metadata
        bad: set[int] = set()
        acks = Acks(step=step.number)
        for load in step.loads:
            for block, slot in zip(load.blocks, load.slots, strict=True):
                self.kv[block] = WRONG if self.fails else bytes(self.front.slab.view(slot)[:32])
            acks.aggregate(Acks({load.job: 1}, {load.job} if self.fails else set()))
            bad |= set(load.blocks) if self.fails else set()
            self.fails = False
        for name, tokens in output.num_scheduled_tokens.items():
            self._compute(name, tokens)
        for store in step.stores:
            for block, slot in zip(store.blocks, store.slots, strict=True):
                self.front.slab.view(slot)[:32] = self.kv[block]
            acks.aggregate(Acks({store.job: 1}, {store.job} if bad else set()))
        names = list(output.num_scheduled_tokens)
        samples = [self._samples(name) for name in names]
        output_of_worker = KVConnectorOutput(invalid_block_ids=bad, kv_connector_worker_meta=acks)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[7] if samples_one else [] for samples_one in samples],
            kv_connector_output=output_of_worker,
        )

    def _compute(self, name: str, tokens: int) -> None:
        """Write the hash, or WRONG, into each block that the step completes."""
        request = self.scheduler.requests[name]
        [blocks] = self.scheduler.kv_cache_manager.get_block_ids(name)
        end = min(request.num_computed_tokens, request.num_tokens)
        first = (request.num_computed_tokens - tokens) // BLOCK
        for at in range(first, end // BLOCK):
            wrong = WRONG in [self.kv[block] for block in blocks[:at]]
            self.kv[blocks[at]] = WRONG if wrong else bytes(request.block_hashes[at])[:32]

    def _samples(self, name: str) -> bool:
        request = self.scheduler.requests[name]
        return bool(request.num_computed_tokens >= request.num_tokens)

    def reset_own_cache(self) -> None:
        """Empty vLLM's own cache, not L1."""
        assert self.scheduler.reset_prefix_cache()

    def published(self, request: Any) -> list[bool]:
        """Return for each block whether L1 holds it; fail if L1 holds a wrong one."""
        keys = list(request.block_hashes)
        held: list[bool] = self.front.contains(keys)
        for key, there in zip(keys, held, strict=True):
            if there:
                with self.front.pin([key]) as lease:
                    [view] = lease.views
                    assert bytes(view[:32]) == bytes(key)[:32], "L1 published a wrong block"
        return held


@pytest.fixture
def ahead(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncScheduling]:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(48 * NBYTES))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = AsyncScheduling(checkpoint)
    yield engine
    engine.scheduler.shutdown()


def store_prompt(engine: AsyncScheduling, tokens: list[int]) -> None:
    engine.add("kept", tokens, 1)
    engine.drain()
    engine.reset_own_cache()


def test_failed_load_of_a_long_prompt_publishes_no_block_after_it(ahead: AsyncScheduling) -> None:
    known = prompt("known", 4 * BLOCK)
    store_prompt(ahead, [*known, 1])
    ahead.fails = True
    request = ahead.add("hit", known + prompt("beyond", 20 * BLOCK))  # three steps
    ahead.step()
    ahead.step()  # vLLM builds it before the first is reported
    ahead.drain()
    assert not ahead.fails
    ahead.published(request)
    assert ahead.side.stack.stats().pinned_slots == 0


def test_request_that_found_blocks_of_a_failed_load_publishes_none_after_them(
    ahead: AsyncScheduling,
) -> None:
    known = prompt("known", 4 * BLOCK)
    store_prompt(ahead, [*known, 1])
    ahead.fails = True
    first = ahead.add("first", known + prompt("first", BLOCK))
    ahead.step()
    second = ahead.add("second", known + prompt("second", 12 * BLOCK))  # finds them in vLLM's cache
    ahead.step()
    assert not ahead.fails
    assert second.num_computed_tokens > 4 * BLOCK
    ahead.drain()
    ahead.published(first)
    ahead.published(second)
    ahead.reset_own_cache()
    again = ahead.add("again", known + prompt("second", 12 * BLOCK))
    ahead.drain()
    assert all(ahead.published(again))
