"""The engines for which kvcache is turned off, each with its reason.

Both sides of the connector call this module. The scheduler's side has the config that the engine
core changed after it started the workers. A worker's side has the config that its own process
changed while it built the model, and the cache spec of every layer; the scheduler has one spec for
the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcache.connectors.vllm.compat import hash_tokens
from kvcache.connectors.vllm.groups import groups_refusal, kept_groups

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def refusal(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Return why blocks of this engine cannot be kept; ``None`` if they can."""
    return (
        groups_refusal(kv_cache_config)
        or _resume_refusal(vllm_config)
        or _parallel_refusal(vllm_config)
        or _match_unit_refusal(vllm_config, kv_cache_config)
    )


def _resume_refusal(vllm_config: VllmConfig) -> str | None:
    """Return why this engine cannot start in the middle of a prompt.

    vLLM then clears ``enable_prefix_caching`` itself. A user may clear it for any model, so the
    flag alone does not show the reason. Other settings show vLLM's own decision:

    * ``is_prefix_caching_supported`` is false for pooling over the whole prompt and for models with
      an encoder;
    * MLA on a CPU without AMX, attention that is not causal, and RISC-V lose chunked prefill as
      well, which needs the same ability;
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
    # vLLM has a flag of the model before 0.31, and from then on auxiliary outputs: these alone.
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
    """Return why hits that end inside a block exclude asynchronous copies.

    vLLM's second model runner copies such a block into a new one before it calls the connector. A
    store of an earlier step may still read that new block, and the connector cannot delay vLLM's
    copy. On a CPU every store has ended with its step.
    """
    if vllm_config.device_config.device_type == "cpu":
        return None
    groups = kept_groups(kv_cache_config, hash_tokens(vllm_config, kv_cache_config))
    unit = vllm_config.cache_config.prefix_match_unit
    if unit is not None and unit < min(group.block_tokens for group in groups):
        return (
            f"prefix_match_unit is {unit}, below the block size, "
            f"{min(group.block_tokens for group in groups)}: vLLM copies blocks that a store may "
            "still read; leave --prefix-match-unit out"
        )
    state = next((group for group in groups if group.is_state), None)
    if state is not None and state.hashes_per_block > 1:
        return (
            f"its states have blocks of {state.block_tokens} tokens and vLLM's hashes "
            f"{state.block_tokens // state.hashes_per_block}: vLLM copies blocks that a store may "
            "still read"
        )
    return None
