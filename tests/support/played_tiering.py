"""vLLM's own offloading manager and host memory on a CPU, with kvcache's tiers below it.

Everything is vLLM's: the spec, its manager, the primary tier and its shared memory. A test plays
the scheduler and the GPU: it writes and reads the rows of the host memory.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("kvcache.connectors.vllm.secondary", exc_type=ImportError)  # from vLLM 0.32 on

import torch
from vllm.config.load import LoadConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_offload.base import (
    LookupResult,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvcache.connectors.vllm.secondary import KVCacheTier
from tests.support.failing_parts import DictTier, FaultyTier
from tests.support.waiting import PATIENCE_S, eventually

BLOCK_TOKENS = 16
RANK_NBYTES = 4096  # of one block on one rank
_WAITING = (LookupResult.RETRY, LookupResult.HIT_PENDING)
_numbers = itertools.count()


class SharedFaultyTier(FaultyTier):
    """A tier of a played engine that fails on command; all instances share their blocks.

    Attributes:
        shared: the blocks by key.
        opened: the instances, the last one at the end.
    """

    shared: ClassVar[dict[bytes, bytes]] = {}
    opened: ClassVar[list[SharedFaultyTier]] = []

    def __init__(self) -> None:
        blocks = DictTier()
        blocks.held = self.shared
        super().__init__(blocks)
        self.held = self.shared
        self.opened.append(self)

    @classmethod
    def last(cls) -> SharedFaultyTier:
        """Return the instance that was opened last."""
        return cls.opened[-1]

    @classmethod
    def table(cls, **options: object) -> dict[str, object]:
        """Return the options of such a tier in vLLM's configuration.

        By default its deadline is longer than any test takes on a busy machine.
        """
        kind = f"{__name__}:{cls.__name__}"
        return {"name": "faulty", "kind": kind, "deadline_s": PATIENCE_S, **options}


def disk_table(folder: Path) -> dict[str, object]:
    """Return the options of a disk in vLLM's configuration, with a deadline that is not missed."""
    return {
        "name": "disk",
        "kind": "disk",
        "path": str(folder / "disk"),
        "capacity": "8MiB",
        "deadline_s": PATIENCE_S,
    }


def mapped_engines() -> set[str]:
    """Return the ids of the played engines with host memory that this process maps."""
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"vllm_offload_(played-[\d-]+)\.", maps))


def key_of(prompt: str, chunk: int, group: int = 0) -> Any:
    """Return vLLM's key of a chunk of a prompt in a KV cache group."""
    return make_offload_key(f"{prompt}/{chunk}".encode().ljust(32, b"."), group)


def keys_of(prompt: str, chunks: int, group: int = 0) -> list[Any]:
    """Return vLLM's keys of the first chunks of a prompt."""
    return [key_of(prompt, chunk, group) for chunk in range(chunks)]


def block_of(key: bytes, nbytes: int) -> bytes:
    """Return the bytes that the engine computes for a key."""
    seed = int.from_bytes(key, "big")
    return np.random.default_rng(seed).bytes(nbytes)


def engine_settings(
    engine_id: str, *, model: str = "model", tensor: int = 1, lora: object = None
) -> tuple[Any, Any]:
    """Return what kvcache reads of vLLM's two configurations of an engine."""
    text = json.dumps({"layers": 2})
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
    )
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=model,
            revision=None,
            hf_config=SimpleNamespace(
                to_json_string=lambda use_diff: text, auto_map=None, _commit_hash=None
            ),
            max_model_len=1024,
            trust_remote_code=False,
            dtype="torch.bfloat16",
            quantization=None,
        ),
        load_config=LoadConfig(),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            tensor_parallel_size=tensor,
            data_parallel_size=1,
            data_parallel_size_local=1,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        device_config=SimpleNamespace(device_type="cuda"),
        kv_transfer_config=SimpleNamespace(engine_id=engine_id),
        lora_config=lora,
    )
    group = SimpleNamespace(layer_names=["one", "two"], kv_cache_spec=spec)
    return vllm_config, SimpleNamespace(kv_cache_groups=[group])


class PlayedTiering:
    """One engine's offloading: vLLM's manager, and one secondary tier of kvcache.

    Args:
        options: of the secondary tier, as in vLLM's configuration.
        rows: of vLLM's host memory.
        groups: KV cache groups.
        tensor: ranks.
        chunk: blocks of a chunk.
        events: whether vLLM publishes KV events.
        settings: of :func:`engine_settings`; ``None`` hides the engine's configuration.

    Attributes:
        manager: vLLM's manager.
        tier: the secondary tier.
    """

    def __init__(
        self,
        options: Mapping[str, object],
        *,
        rows: int = 16,
        groups: int = 1,
        tensor: int = 1,
        chunk: int = 1,
        events: bool = False,
        settings: Mapping[str, Any] | None = {},
    ) -> None:
        self.row_nbytes = RANK_NBYTES * tensor * chunk
        self._engine_id = engine_id = f"played-{os.getpid()}-{next(_numbers)}"
        self.spec = TieringOffloadingSpec(
            OffloadingConfig(
                groups=tuple(
                    OffloadingGroupConfig(BLOCK_TOKENS, (f"layer.{number}",), number)
                    for number in range(groups)
                ),
                worker_kv_bytes_per_block=RANK_NBYTES,
                enable_kv_cache_events=events,
                extra_config={
                    "cpu_bytes_to_use": rows * self.row_nbytes,
                    "secondary_tiers": [
                        {
                            "type": "KVCacheTier",
                            "module_path": "kvcache.connectors.vllm.secondary",
                            **options,
                        }
                    ],
                },
                engine_id=engine_id,
                model=OffloadingModelConfig("model", "bfloat16"),
                cache=OffloadingCacheConfig(BLOCK_TOKENS, chunk),
                parallel=OffloadingParallelConfig(
                    rank=0,
                    world_size=tensor,
                    tp_size=tensor,
                    pp_size=1,
                    pcp_size=1,
                    dcp_size=1,
                    data_parallel_index=0,
                    data_parallel_size=1,
                    data_parallel_rank_local=None,
                    is_parallelism_agnostic=False,
                ),
            )
        )
        if settings is None:
            self.manager: Any = self.spec.get_manager()
        else:
            configs = engine_settings(engine_id, **{"tensor": tensor, **settings})
            self.manager = self._as_vllm_opens_it(*configs)
        self.tier: KVCacheTier = self.manager.secondary_tiers[0]

    def _as_vllm_opens_it(self, vllm_config: Any, kv_cache_config: Any) -> Any:
        """Open the manager in a function with the arguments of vLLM's own."""
        return self.spec.get_manager()

    # The scheduler

    def start(self, request_id: str, **arguments: Any) -> ReqContext:
        """Let vLLM's manager know a new request."""
        request = ReqContext(request_id, **arguments)
        self.manager.on_new_request(request)
        return request

    def finish(self, *requests: ReqContext) -> None:
        """Let vLLM's manager know that requests have ended."""
        for request in requests:
            self.manager.on_request_finished(request)

    def step(self, *scheduled: ReqContext) -> None:
        """End a step, in which some requests were scheduled for the first time."""
        self.manager.on_schedule_end(ScheduleEndContext([each.req_id for each in scheduled], []))

    def settle(self) -> None:
        """Make steps until all jobs have ended and were reported."""

        def settled() -> bool:
            self.step()
            return not self.manager.has_pending_work()

        eventually(settled, "jobs of the secondary tier")

    def find(self, request: ReqContext, keys: Sequence[Any]) -> list[bool]:
        """Look up keys, and promote what is found; return which keys vLLM's memory has then."""
        results: list[LookupResult] = []

        def answered() -> bool:
            results[:] = [self.manager.lookup(key, request) for key in keys]
            self.step()
            return not any(result in _WAITING for result in results)

        eventually(answered, "lookups in the secondary tier")
        return [result is LookupResult.HIT for result in results]

    # The GPU

    def store(
        self, request: ReqContext, keys: Sequence[Any], blocks: Sequence[bytes] | None = None
    ) -> None:
        """Compute the blocks of keys, and store them in vLLM's memory and below.

        ``blocks`` are what the GPU writes; by default the bytes of :func:`block_of`.
        """
        for position, key in enumerate(keys, 1):
            request.set_offload_key_position(key, position * BLOCK_TOKENS)
        self.store_placed(request, keys, blocks)

    def store_placed(
        self, request: ReqContext, keys: Sequence[Any], blocks: Sequence[bytes] | None = None
    ) -> None:
        """Store blocks as :meth:`store` does; the caller has set their positions."""
        given = dict(zip(keys, blocks, strict=True)) if blocks is not None else {}
        prepared = self.manager.prepare_store(keys, request)
        assert prepared is not None, "vLLM's memory is full of pinned rows"
        new = prepared.keys_to_store
        for key, row in zip(new, prepared.store_spec.chunk_ids, strict=True):
            self.write_row(int(row), given.get(key) or block_of(key, self.row_nbytes))
        if new:
            self.manager.complete_store(set(new), request)  # vLLM passes a set

    def read(self, request: ReqContext, keys: Sequence[Any]) -> list[bytes]:
        """Return the blocks of keys that vLLM's memory has."""
        rows = self.manager.prepare_load(keys, request).chunk_ids
        memory = self.memory()
        blocks = [bytes(memory[int(row)]) for row in rows]
        self.manager.complete_load(keys, request)
        return blocks

    def memory(self) -> Any:
        """Return vLLM's host memory as an array of rows."""
        view = self.manager.primary_tier.get_kv_memoryview()
        return np.frombuffer(view, np.uint8).reshape(view.shape)

    def write_row(self, row: int, block: bytes) -> None:
        """Write a row of vLLM's memory, as the GPU does."""
        self.memory()[row] = np.frombuffer(block, np.uint8)

    def expected(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the right bytes of keys."""
        return [block_of(key, self.row_nbytes) for key in keys]

    def is_mapped(self) -> bool:
        """Whether this process still maps vLLM's host memory."""
        return self._engine_id in mapped_engines()

    def close(self) -> None:
        """Shut vLLM's manager down."""
        self.manager.shutdown()


@contextmanager
def played(options: Mapping[str, object], **arguments: Any) -> Iterator[PlayedTiering]:
    """Open the offloading of an engine, and shut it down at the end."""
    engine = PlayedTiering(options, **arguments)
    try:
        yield engine
    finally:
        engine.close()


def keep(options: Mapping[str, object], keys: Sequence[Any], **arguments: Any) -> None:
    """Have one engine store blocks in its tiers, and end."""
    with played(options, **arguments) as engine:
        request = engine.start("keeps")
        engine.store(request, keys)
        engine.settle()
        engine.finish(request)


def found(options: Mapping[str, object], keys: Sequence[Any], **arguments: Any) -> list[bool]:
    """Return which keys a new engine finds in its tiers; checks the bytes of those."""
    with played(options, **arguments) as engine:
        request = engine.start("finds")
        held = engine.find(request, keys)
        hits = [key for key, is_held in zip(keys, held, strict=True) if is_held]
        assert engine.read(request, hits) == engine.expected(hits)
        engine.finish(request)
        return held
