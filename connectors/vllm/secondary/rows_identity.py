"""Identity of the rows of vLLM's host memory: which engines find each other's blocks.

vLLM passes a secondary tier the shape of the rows and the model's name, which says nothing of its
weights. The engine's whole configuration is an argument of the calls that construct the tier, and
is read from there. Without it, the blocks are shared with no other process.

A row has the bytes of all ranks of one chunk, so the fields include all that decides where they lie
in it. Engines with another number of ranks or another chunk have other rows.
"""

from __future__ import annotations

import inspect
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvcache.connectors.vllm.identity.fields import UNSHARED, identity

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadingSpec

log = logging.getLogger(__name__)

_ATTENTION_PACKAGES: Final = ("flashinfer-python", "flash-attn")
"""Packages that vLLM may compute attention with, where they are installed."""


class EngineConfigs(NamedTuple):
    """The two configurations that an engine's identity depends on."""

    vllm: VllmConfig
    cache: KVCacheConfig


def engine_configs(engine_id: str) -> EngineConfigs | None:
    """Return the configurations of the engine that is constructing a secondary tier now.

    They are arguments of vLLM's own functions further up in this thread.

    Args:
        engine_id: of the engine, to recognize its configuration.
    """
    frame = inspect.currentframe()
    while frame is not None:
        names = frame.f_locals
        config, cache = names.get("vllm_config"), names.get("kv_cache_config")
        transfer = getattr(config, "kv_transfer_config", None)
        if (
            transfer is not None
            and getattr(transfer, "engine_id", None) == engine_id
            and hasattr(cache, "kv_cache_groups")
        ):
            return EngineConfigs(names["vllm_config"], names["kv_cache_config"])
        frame = frame.f_back
    return None


def rows_identity(
    spec: OffloadingSpec, row_nbytes: int, configs: EngineConfigs | None
) -> dict[str, object]:
    """Return the fields of the namespace of an engine's rows.

    Args:
        spec: as vLLM passes it to a secondary tier.
        row_nbytes: bytes of a row.
        configs: of the engine; ``None`` if unknown, which shares the blocks with no other process.
    """
    rows = _row_fields(spec, row_nbytes)
    if configs is None:
        log.warning(
            "kvcache: secondary tier: vLLM's configuration was not found (this vLLM constructs "
            "secondary tiers in another way); blocks are shared with no other process, nor with "
            "this engine after a restart"
        )
        return rows | _unshared("the engine's configuration is unknown")
    fields = identity(configs.vllm, configs.cache) | rows | _attention_fields(configs.vllm)
    if getattr(configs.vllm, "lora_config", None) is not None and "explicit" not in fields:
        # vLLM's keys have the name of an adapter, and a secondary tier sees only the keys.
        fields |= _unshared("LoRA is on, and vLLM passes no adapter's files")
    return fields


def _row_fields(spec: OffloadingSpec, row_nbytes: int) -> dict[str, object]:
    config = spec.config
    parallel = config.parallel
    return {
        "memory": "rows of vLLM's offloading",  # a slot of L1 has the same bytes in another order
        "row": row_nbytes,
        "rank of a row": config.worker_kv_bytes_per_block,
        "chunk": spec.blocks_per_chunk,
        "hash tokens": config.cache.tokens_per_hash,
        "offloaded groups": [
            [group.group_id, group.tokens_per_block, list(group.layer_names)]
            for group in config.groups
        ],
        "all ranks": [
            parallel.tp_size,
            parallel.pp_size,
            parallel.pcp_size,
            parallel.dcp_size,
            parallel.world_size,
        ],
        "replicated": spec.replicated_layout,
        "canonical": config.canonical_layout,
        "row layout": str(config.kv_cache_layout),
        "row dtype": config.model.dtype,
    }


def _attention_fields(vllm_config: VllmConfig) -> dict[str, object]:
    """Return what decides with which kernels the workers compute attention."""
    from vllm.platforms import current_platform

    settings = getattr(vllm_config, "attention_config", None)
    return {
        "attention": str(getattr(settings, "backend", None)),
        "attention packages": [_version(package) for package in _ATTENTION_PACKAGES],
        "device": str(current_platform.get_device_capability()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _unshared(reason: str) -> dict[str, object]:
    return {UNSHARED: reason, "process": os.urandom(16).hex()}


def element_nbytes(dtype: str) -> int:
    """Return the bytes of a number of vLLM's data type ``dtype``, such as ``"bfloat16"``."""
    import torch

    known: Any = getattr(torch, dtype, None)
    if isinstance(known, torch.dtype):
        return int(known.itemsize)
    return 1 if dtype.startswith(("fp8", "int8", "nvfp4")) else 2
