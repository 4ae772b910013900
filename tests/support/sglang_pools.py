"""SGLang's own host pools on a CPU, and backends that its factory creates for them.

Importing this module skips the tests of a file where SGLang is missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("sglang", reason="needs SGLang: make sglang")


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which SGLang imports for images and the host pools do not use."""

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it was created."""


if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.append(_Torchvision())

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns that it finds no GPU
    import torch
    from sglang.srt.mem_cache.device_pool_info import (
        KVBufferLayout,
        KVBuffers,
        MambaStateBufferInfo,
        MHABufferInfo,
        MLABufferInfo,
    )
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
    from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool, LogicalHostPool
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost
    from sglang.srt.mem_cache.pool_host.host_pool_decl import HostPoolDecl, HostPoolStorageInfo
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
    from sglang.srt.mem_cache.pool_host.mha import (
        AsymmetricMHATokenToKVPoolHost,
        MHATokenToKVPoolHost,
    )
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
    from sglang.srt.plugins.hook_registry import HookRegistry

    from kvcache.connectors.sglang.weight_updates import register

# Load the plugin before the first backend, as SGLang does in a process with a scheduler.
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "sglang.srt.managers.scheduler", sys)
    register()
HookRegistry.apply_hooks()

LAYERS, HEADS, HEAD_DIM, PAGE_TOKENS, PAGES = 2, 2, 8, 4, 24
TOKENS = PAGES * PAGE_TOKENS
LAYOUTS = ("page_first_direct", "page_first", "layer_first")
CPU = torch.device("cpu")
BUDGET_NBYTES = 1 << 30  # SGLang otherwise wants 10 GB of free memory


def _pointers(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def mha_pool(
    layout: str = LAYOUTS[0], *, v_head_dim: int = HEAD_DIM, dtype: str = "bfloat16"
) -> Any:
    """Return a host pool of attention with K and V; of two sizes if ``v_head_dim`` differs."""
    kind = getattr(torch, dtype)
    keys = [torch.zeros(TOKENS, HEADS, HEAD_DIM, dtype=kind) for _ in range(LAYERS)]
    values = [torch.zeros(TOKENS, HEADS, v_head_dim, dtype=kind) for _ in range(LAYERS)]
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=tuple(keys),
            v=tuple(values),
            k_data_ptrs=_pointers(keys),
            v_data_ptrs=_pointers(values),
            layout=KVBufferLayout.NHD,
        ),
        page_size=PAGE_TOKENS,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=v_head_dim,
        dtype=kind,
        device=CPU,
    )
    cls = MHATokenToKVPoolHost if v_head_dim == HEAD_DIM else AsymmetricMHATokenToKVPoolHost
    with host_memory_budget_scope(BUDGET_NBYTES):
        return cls(
            info, 1.0, 0, PAGE_TOKENS, layout,
            pin_memory=False, device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS,
        )  # fmt: skip


def mla_pool(layout: str = LAYOUTS[0]) -> Any:
    """Return a host pool of MLA: one part per page, equal on all tensor-parallel ranks."""
    rank, rope = 24, 8
    rows = [torch.zeros(TOKENS, 1, rank + rope, dtype=torch.bfloat16) for _ in range(LAYERS)]
    info = MLABufferInfo(
        buffers=tuple(rows),
        data_ptrs=_pointers(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE_TOKENS,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        kv_cache_dim=rank + rope,
        dtype=torch.bfloat16,
        device=CPU,
    )
    with host_memory_budget_scope(BUDGET_NBYTES):
        return MLATokenToKVPoolHost(
            info, 1.0, 0, PAGE_TOKENS, layout,
            pin_memory=False, device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS,
            target_layer_num=LAYERS,
        )  # fmt: skip


def mamba_pool() -> Any:
    """Return a host pool of Mamba states: parts of three sizes, one slot per page."""
    info = MambaStateBufferInfo(
        temporal=torch.zeros(LAYERS, PAGES, 3, 16, dtype=torch.float32),
        conv=(
            torch.zeros(LAYERS, PAGES, 5, 3, dtype=torch.bfloat16),
            torch.zeros(LAYERS, PAGES, 7, 3, dtype=torch.bfloat16),
        ),
    )
    with host_memory_budget_scope(BUDGET_NBYTES):
        return MambaPoolHost(
            info, 1.0, 0, device_capacity=PAGES, pin_memory=False, layout="page_first"
        )


def indexer_pool(anchor: Any) -> Any:
    """Return a host pool of DSA's index keys, which shares the pages of ``anchor``."""
    nbytes = 12  # of a token and layer
    buffers = [torch.zeros(PAGES, nbytes * PAGE_TOKENS, dtype=torch.uint8) for _ in range(LAYERS)]
    device = SimpleNamespace(  # what a host pool reads of the GPU's pool
        store_dtype=torch.uint8, start_layer=0, end_layer=LAYERS, layer_num=LAYERS,
        layer_shard_enabled=False, index_k_with_scale_buffer=buffers, device="cpu",
    )  # fmt: skip
    decl = HostPoolDecl(
        pool_name=PoolName.INDEXER,
        device_pool=device,
        indices_from_pool=PoolName.KV,
        layout_source=PoolName.KV,
        storage_info=HostPoolStorageInfo(bytes_per_token_per_layer=nbytes, dtype=torch.uint8),
        host_pool_builder=None,
    )
    with host_memory_budget_scope(BUDGET_NBYTES):
        return DSAIndexerPoolHost(decl, anchor, pin_memory=False)


def compressed_pool(layout: str = LAYOUTS[0]) -> Any:
    """Return a host pool of DeepSeek V4's compressed KV."""
    with host_memory_budget_scope(BUDGET_NBYTES):
        return DeepSeekV4PagedHostPool(
            "deepseek_v4_c4",
            [torch.zeros(PAGES, 96, dtype=torch.uint8) for _ in range(LAYERS)],
            96, PAGES, PAGE_TOKENS, layout, pin_memory=False,
        )  # fmt: skip


def logical_pool() -> Any:
    """Return DeepSeek V4's anchor, which numbers pages and has no memory."""
    return LogicalHostPool(TOKENS, PAGE_TOKENS, LAYOUTS[0])


def memory_of(pool: Any) -> list[torch.Tensor]:
    """Return the tensors that have the pool's pages, as bytes."""
    found: list[Any] = []
    for name in ("kv_buffer", "index_k_with_scale_buffer"):
        with suppress(AttributeError):
            buffer = getattr(pool, name)
            found += buffer if isinstance(buffer, list | tuple) else [buffer]
    return [each.reshape(-1).view(torch.uint8) for each in found if each is not None]


def fill(pool: Any, seed: int) -> None:
    """Fill the pool's memory with bytes that depend on ``seed``."""
    numbers = torch.Generator().manual_seed(seed)
    for tensor in memory_of(pool):
        tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=numbers))


def page_bytes(pool: Any, page: int) -> bytes:
    """Return the bytes of a page, by SGLang's own function where the pool has it."""
    try:
        parts = [pool.get_data_page(page * pool.page_size)]
    except NotImplementedError:  # K and V of two sizes: the pages lie along the first axis
        parts = []
        for buffer in (pool.k_buffer, pool.v_buffer):
            rows = buffer.shape[0] // pool.page_num
            parts.append(buffer[page * rows : (page + 1) * rows])
    flat = [part.contiguous().reshape(-1).view(torch.uint8) for part in parts]
    return b"".join(bytes(part.numpy()) for part in flat)


def indices(pool: Any, pages: Sequence[int]) -> torch.Tensor:
    """Return the host indices of ``pages``."""
    size = pool.page_size
    return torch.tensor([page * size + token for page in pages for token in range(size)])


def page_keys(count: int, prompt: str = "a") -> list[str]:
    """Return hashes of pages as SGLang's: 64 hexadecimal digits."""
    return [(f"{ord(prompt):02x}" + f"{number:06x}") * 8 for number in range(count)]


def config(
    options: dict[str, Any],
    *,
    model: str = "model",
    tp: tuple[int, int] = (0, 1),
    mla: bool = False,
    metrics: bool = False,
) -> HiCacheStorageConfig:
    """Return SGLang's config of the backend for one rank."""
    return HiCacheStorageConfig(
        tp_rank=tp[0],
        tp_size=tp[1],
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=mla,
        enable_storage_metrics=metrics,
        is_page_first_layout=False,
        model_name=model,
        extra_config={
            "backend_name": "kvcache",
            "module_path": "kvcache.connectors.sglang",
            "class_name": "KVCacheStorage",
            "interface_v1": 1,
            **options,
        },
    )


def open_backend(
    storage_config: HiCacheStorageConfig, pool: Any, others: dict[PoolName, Any] | None = None
) -> Any:
    """Create a backend as SGLang's cache controllers do."""
    backend = StorageBackendFactory.create_backend("dynamic", storage_config, pool)
    try:
        backend.register_mem_pool_host(pool)
        if others is not None:
            for name, each in {PoolName.KV: pool, **others}.items():
                backend.register_mem_host_pool_v2(each, name)
        backend.on_host_pools_registered()
    except BaseException:
        backend.close()
        raise
    return backend
