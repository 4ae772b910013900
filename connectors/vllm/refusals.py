"""Engines of which no block is kept and to which none is given, each with its reason.

Both halves of the connector ask. The scheduler's half sees what the engine core decided after it
had started the workers. A worker's half sees what its own process decided while it built the model,
and the cache spec of every layer, where the scheduler has one layer's for the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def refusal(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Return why blocks of this engine cannot be kept; ``None`` when they can."""
    return (
        _cache_refusal(kv_cache_config)
        or _resume_refusal(vllm_config)
        or _parallel_refusal(vllm_config)
        or _match_unit_refusal(vllm_config, kv_cache_config)
    )


def _cache_refusal(kv_cache_config: KVCacheConfig) -> str | None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups, and blocks of one can be kept"
    if not getattr(groups[0], "enable_kv_transfer", True):
        return "vLLM rebuilds its KV cache group from others, and it must not be loaded"
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    spec = groups[0].kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        specs = list(spec.kv_cache_specs.values())
    else:
        specs = [spec]
    for layer in specs:
        if reason := _spec_refusal(layer):
            return reason
    return None


def _spec_refusal(spec: KVCacheSpec) -> str | None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    # Exact types: a subclass exists because its blocks are not those of full attention. RSWASpec
    # drops blocks of generated tokens, SinkFullAttentionSpec attends to sinks outside of the
    # request's blocks, HiddenStateCacheSpec holds no keys and values.
    allowed = (FullAttentionSpec, MLAAttentionSpec)
    if type(spec) not in allowed:
        names = " and ".join(kind.__name__ for kind in allowed)
        return f"its cache is {type(spec).__name__}, and only {names} can be kept"
    if getattr(spec, "non_causal", False):
        return "its attention is not causal: a block's KV depends on the tokens after it"
    return None


def _resume_refusal(vllm_config: VllmConfig) -> str | None:
    """Return why this engine cannot start in the middle of a prompt.

    vLLM clears ``enable_prefix_caching`` itself where that is so, and a user may clear it for any
    model, so the flag alone does not tell. Other marks of vLLM's own decision do:

    * ``is_prefix_caching_supported`` is false for pooling over the whole prompt and for models with
      an encoder;
    * MLA on a CPU without AMX, attention that is not causal, and RISC-V lose chunked prefill as
      well, which takes the same ability;
    * batch invariance clears the flag in the worker's process, for some attention backends;
    * R-SWA has a cache spec of its own.
    """
    from vllm import envs

    model, cache = vllm_config.model_config, vllm_config.cache_config
    if not model.is_prefix_caching_supported:
        return "vLLM does not support prefix caching for this model or its pooling"
    if _returns_routed_experts(vllm_config):
        return "vLLM returns routed experts, and has none for tokens that were loaded"
    if cache.enable_prefix_caching:
        return None
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        return (
            "prefix caching and chunked prefill are both off, as vLLM sets them for an engine that "
            "cannot resume a prompt"
        )
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return (
            "VLLM_BATCH_INVARIANT is set and prefix caching is off, as vLLM sets it for attention "
            "that is not invariant after a hit"
        )
    return None


def _returns_routed_experts(vllm_config: VllmConfig) -> bool:
    # vLLM 0.29 has the flag on the model, 0.32 has auxiliary outputs, of which these are the only.
    outputs = getattr(vllm_config, "aux_output_config", None)
    before = getattr(vllm_config.model_config, "enable_return_routed_experts", False)
    return bool(before or (outputs is not None and outputs.enabled))


def _parallel_refusal(vllm_config: VllmConfig) -> str | None:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}, and it must be 1"
    return None


def _match_unit_refusal(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Return why hits inside of a block cannot be had beside copies that outlive their step.

    vLLM's second model runner copies such a block into a new one before it calls the connector. A
    store of an earlier step may still read that new block, and nothing can hold vLLM's copy back.
    On a CPU every store has ended with its step.
    """
    unit = vllm_config.cache_config.prefix_match_unit
    block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    if unit is None or unit >= block or vllm_config.device_config.device_type == "cpu":
        return None
    return (
        f"prefix_match_unit is {unit}, below the block size, {block}: vLLM copies blocks that a "
        "store may still read; leave --prefix-match-unit out"
    )
