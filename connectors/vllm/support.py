"""What this connector can work with, said at start: the engine's version, its cache, its host."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

OLDEST_VLLM = (0, 29)
SCHEMA = 1  # of what a block's bytes are; another number is another namespace


def check_version(version: str) -> None:
    """Refuse a vLLM whose KV cache layouts are not those of 0.29 and later.

    Raises:
        ImportError: naming both versions.
    """
    # A build from source may have no version number, or 0.1.dev; it is taken at its word.
    numbers = re.match(r"(?!0\.1\.dev)(\d+)\.(\d+)", version)
    if numbers and (0, 0) < tuple(map(int, numbers.groups())) < OLDEST_VLLM:
        raise ImportError(
            f"kvcache needs vLLM {'.'.join(map(str, OLDEST_VLLM))} or newer; this is {version}"
        )


def log_as_vllm_does() -> None:
    """Have what kvcache logs said where vLLM's words go, unless somebody saw to it already.

    vLLM gives handlers to the logger ``vllm`` alone; without one, only warnings would be heard.
    """
    ours, theirs = logging.getLogger("kvcache"), logging.getLogger("vllm")
    if not ours.hasHandlers() and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False


def host_name() -> str:
    """One running kernel and pid namespace: the reach of a slab's descriptor."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}/{boot}/{Path('/proc/self/ns/pid').readlink()}"


def identity(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> dict[str, object]:
    """What must agree before another engine's block can be this one's, beyond its hash.

    vLLM's block hashes cover tokens, LoRA, images and salt, and not the model.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    return {
        "schema": SCHEMA,
        "model": model.model,
        "revision": model.revision,
        "config": model.hf_config.to_json_string(),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache dtype": cache.cache_dtype,
        "hash": cache.prefix_caching_hash_algo,
        "hash seed": os.environ.get("PYTHONHASHSEED"),
        "layout": str(getattr(kv_cache_config, "kv_cache_layout", None)),
        "groups": [
            [group.layer_names, repr(group.kv_cache_spec)]
            for group in kv_cache_config.kv_cache_groups
        ],
        "ranks": [parallel.pipeline_parallel_size, parallel.tensor_parallel_size],
    }


def refusal(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why the blocks of this engine cannot be kept; ``None`` when they can."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups, and blocks of one can be kept"
    spec = groups[0].kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        specs = list(spec.kv_cache_specs.values())
    else:
        specs = [spec]
    for layer in specs:
        if not isinstance(layer, FullAttentionSpec):
            return f"its cache is {type(layer).__name__}, and only full attention can be kept"
        if getattr(layer, "non_causal", False):
            return "its attention is not causal: a block's KV depends on the tokens after it"
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}, and it must be 1"
    return None
