"""vLLM's own scheduler and offloading connector on a CPU, with kvcache's tiers below them.

A test plays the workers: the KV of a block is a digest of the block's hash, and jobs of the
connector copy it between the simulated GPU and vLLM's host memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.played_scheduler import write_config
from tests.support.waiting import PATIENCE_S, eventually

BLOCK = 16  # tokens
BLOCKS = 64  # of the engine
NBYTES = 4096  # of a block
ROWS = 32


class PlayedOffloading:
    """One engine: vLLM's scheduler, connector, manager and host memory, and played workers.

    Args:
        folder: for the model's configuration.
        options: of the secondary tier, as in vLLM's configuration.
        chunk: blocks of a chunk.

    Attributes:
        scheduler: vLLM's.
        loaded: how many blocks the workers copied from the host memory to the GPU.
    """

    def __init__(self, folder: Path, options: Mapping[str, object], *, chunk: int = 1) -> None:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        tier = {"type": "KVCacheTier", "module_path": "kvcache.connectors.vllm.secondary"}
        extra = {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": ROWS * chunk * NBYTES,
            "blocks_per_chunk": chunk,
            "secondary_tiers": [{**tier, **options}],
        }
        config = EngineArgs(
            model=str(write_config(folder)),
            skip_tokenizer_init=True,
            block_size=BLOCK,
            max_model_len=1024,
            max_num_batched_tokens=512,
            kv_transfer_config={
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": extra,
            },
        ).create_engine_config()
        config.scheduler_config.async_scheduling = False
        config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32
        )
        assert spec.page_size_bytes == NBYTES
        cache = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        with set_current_vllm_config(config):
            self.scheduler: Any = Scheduler(
                config, cache, StructuredOutputManager(config), BLOCK, log_stats=True
            )
        manager = self.scheduler.connector.connector_scheduler.manager
        self.tier = manager.secondary_tiers[0]
        self._host = manager.primary_tier.get_kv_memoryview().cast("B")
        self._row_nbytes = chunk * NBYTES
        self._chunk = chunk
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.gpu: list[bytes] = [b""] * BLOCKS
        self.loaded = 0

    def run(self, name: str, tokens: Sequence[int]) -> int:
        """Run a prompt to its end; return how many of its tokens were not computed."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        sampling.update_from_generation_config({}, None)
        request = Request(name, list(tokens), sampling, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        computed: list[int] = []

        def ended() -> bool:
            computed.append(self.step().get(name, 0))
            return not (self.scheduler.has_requests() or self.tier.has_pending_work())

        eventually(ended, f"request {name} within {PATIENCE_S} s")
        return len(tokens) - sum(computed)

    def step(self) -> dict[str, int]:
        """Build, run and report a step; return the tokens that it computed of each request."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output = self.scheduler.schedule()
        metadata, finished = output.kv_connector_metadata, set()
        for job in metadata.load_jobs.values():
            self._load(job)
            finished.add(job.req_id)
        for name, tokens in output.num_scheduled_tokens.items():
            self._compute(name, tokens)
        for job in metadata.store_jobs.values():
            self._store(job)
        names = list(output.num_scheduled_tokens)
        report = KVConnectorOutput(
            finished_recving=finished,
            kv_connector_worker_meta=_completed([*metadata.load_jobs, *metadata.store_jobs]),
        )
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: at for at, name in enumerate(names)},
                sampled_token_ids=[[7] if self._samples(name) else [] for name in names],
                kv_connector_output=report,
            ),
        )
        return dict(output.num_scheduled_tokens)

    def _samples(self, name: str) -> bool:
        request = self.scheduler.requests[name]
        return bool(request.num_computed_tokens >= request.num_tokens)

    def _compute(self, name: str, tokens: int) -> None:
        """Write the KV of the blocks that a step completes; check the KV that they depend on."""
        request = self.scheduler.requests[name]
        [blocks] = self.scheduler.kv_cache_manager.get_block_ids(name)
        end = min(request.num_computed_tokens, request.num_tokens)
        first = (request.num_computed_tokens - tokens) // BLOCK
        for at in range(end // BLOCK):
            right = kv_of(request.block_hashes[at])
            if at < first:
                assert self.gpu[blocks[at]] == right, f"block {at} of {name} has wrong KV"
            self.gpu[blocks[at]] = right

    def _store(self, job: Any) -> None:
        for block, (row, part) in self._pairs(job.src_spec.block_ids, job.dst_spec):
            begin = row * self._row_nbytes + part * NBYTES
            self._host[begin : begin + NBYTES] = self.gpu[block].ljust(NBYTES, b".")

    def _load(self, job: Any) -> None:
        for block, (row, part) in self._pairs(job.dst_spec.block_ids, job.src_spec):
            begin = row * self._row_nbytes + part * NBYTES
            self.gpu[block] = bytes(self._host[begin : begin + NBYTES]).rstrip(b".")
            self.loaded += 1

    def _pairs(self, blocks: Any, rows: Any) -> list[tuple[int, tuple[int, int]]]:
        """Return each block of the GPU with the row and the part of the row that it has."""
        chunks = [int(row) for row in rows.chunk_ids]
        assert len(blocks) == len(chunks) * self._chunk, "the test uses whole chunks"
        places = [(row, part) for row in chunks for part in range(self._chunk)]
        return list(zip(map(int, blocks), places, strict=True))

    def close(self) -> None:
        """Shut the engine down."""
        self._host.release()
        self.scheduler.shutdown()


def kv_of(block_hash: bytes) -> bytes:
    """Return the KV of a block."""
    return blake2b(bytes(block_hash), digest_size=32).hexdigest().encode()


def _completed(jobs: Sequence[int]) -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
        OffloadingWorkerMetadata,
    )

    return OffloadingWorkerMetadata(completed_jobs=dict.fromkeys(jobs, 1))


def prompt(name: str, tokens: int) -> list[int]:
    """Return the tokens of a prompt."""
    seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    return [int(token) for token in np.random.default_rng(seed).integers(0, 60, tokens)]
