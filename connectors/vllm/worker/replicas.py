"""Which tensor ranks hold the same bytes of a block, so that they are stored once.

Every rank holds the whole latent vectors of MLA. If a model has fewer KV heads than there are
tensor ranks, consecutive ranks hold the same head. vLLM's cache specs say so for some layers only.

Invariant: where it is not certain that ranks hold the same bytes, they count as different. That
costs memory and is never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

from kvcache.connectors.vllm.groups import specs_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def tensor_replicas(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> tuple[int, ...]:
    """Return how many consecutive tensor ranks hold the same bytes, for each of vLLM's groups."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    by_heads = _ranks_per_head(vllm_config) if ranks > 1 else 1
    return tuple(
        gcd(ranks, *(_replicas(spec, ranks, by_heads) for spec in specs_of(group.kv_cache_spec)))
        if ranks > 1 and group.layer_names
        else 1
        for group in kv_cache_config.kv_cache_groups
    )


def _replicas(spec: Any, ranks: int, by_heads: int) -> int:
    """Return how many consecutive tensor ranks hold the same bytes of a layer.

    Args:
        spec: of the layer.
        ranks: tensor ranks.
        by_heads: tensor ranks for each KV head of the model.
    """
    from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec, MLAAttentionSpec

    if isinstance(spec, MambaSpec):
        return ranks if getattr(spec, "tp_replicated", False) else 1
    if not isinstance(spec, AttentionSpec):
        return 1
    if not hasattr(spec, "max_tp_shards"):  # before vLLM 0.31
        if isinstance(spec, MLAAttentionSpec):
            return ranks
    elif spec.max_tp_shards is not None:
        return ranks // spec.max_tp_shards if ranks % spec.max_tp_shards == 0 else 1
    return by_heads if spec.num_kv_heads == 1 else 1


def _ranks_per_head(vllm_config: VllmConfig) -> int:
    """Return how many tensor ranks hold each KV head; 1 if layers may differ in their heads."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    if vllm_config.speculative_config is not None or model.use_mla:
        return 1  # a draft model has heads of its own
    heads = model.get_total_num_kv_heads()
    if heads >= ranks or ranks % heads:
        return 1
    per_layer = getattr(getattr(model, "model_arch_config", None), "per_layer_overrides", None)
    counts = set(_numbers_of_kv_heads(model.hf_text_config.to_dict()))
    return ranks // heads if per_layer is None and counts == {heads} else 1


def _numbers_of_kv_heads(config: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield every number of KV heads in a model's config: of all layers, or of some."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers_of_kv_heads(value)
        elif re.search("kv_head|key_value_head", str(name)) and value is not None:
            yield from value if isinstance(value, list) else [value]
