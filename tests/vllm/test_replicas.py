"""How many consecutive tensor ranks hold the same bytes of a block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from kvcache.connectors.vllm.messages import Step, Transfer
from kvcache.connectors.vllm.vllm_names import has_name
from kvcache.connectors.vllm.worker.replicas import tensor_replicas
from tests.support.group_hooks import needs_tensor_shards
from tests.support.grouped_caches import grouped_caches, layers
from tests.support.grouped_ranks import Ranks
from tests.support.played_engine import cache_config

pytestmark = pytest.mark.engine

BLOCK = 32


def engine(ranks: int, *, drafts: bool = False, mla: bool = False, **config: Any) -> Any:
    """Return vLLM's config of a model with this text config."""
    heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        speculative_config=object() if drafts else None,
        model_config=SimpleNamespace(
            use_mla=mla,
            get_total_num_kv_heads=lambda: heads,
            hf_text_config=SimpleNamespace(to_dict=lambda: config),
        ),
    )


def attention(heads: int, kind: str = "FullAttentionSpec", **options: Any) -> Any:
    from vllm.v1 import kv_cache_interface

    spec = getattr(kv_cache_interface, kind)
    return spec(block_size=BLOCK, num_kv_heads=heads, head_size=64, dtype=torch.bfloat16, **options)


def state(*, replicated: bool = False) -> Any:
    from vllm.v1.kv_cache_interface import MambaSpec

    options = {"tp_replicated": True} if replicated else {}
    return MambaSpec(block_size=BLOCK, shapes=((4, 8),), dtypes=(torch.float32,), **options)


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "replicas"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (4, 4, 1), (2, 8, 1)]
)
def test_tensor_replicas_of_fewer_kv_heads_than_ranks(
    ranks: int, kv_heads: int, replicas: int
) -> None:
    labels = {0: "LABEL_0"}  # transformers has this in every config
    config = engine(ranks, num_key_value_heads=kv_heads, num_attention_heads=8, id2label=labels)
    spec = attention(max(1, kv_heads // ranks))
    assert tensor_replicas(config, cache_config(spec)) == (replicas,)


@pytest.mark.parametrize(
    "config",
    [
        engine(4, num_key_value_heads=2, num_global_key_value_heads=4),
        engine(4, num_key_value_heads=2, swa={"num_key_value_heads": 4}),
        engine(4, num_key_value_heads=2, n_kv_heads=[2, 2, 1]),
        engine(4, num_key_value_heads=2, drafts=True),
        engine(4, num_key_value_heads=3),
        engine(4, num_attention_heads=2),
    ],
    ids=["other layers", "nested", "by layer", "draft model", "uneven", "no KV heads in config"],
)
def test_tensor_replicas_of_a_model_with_several_numbers_of_heads_is_one(config: Any) -> None:
    assert tensor_replicas(config, cache_config(attention(1))) == (1,)


def test_tensor_replicas_of_layers_with_more_heads_is_one() -> None:
    config = engine(4, num_key_value_heads=2)
    assert tensor_replicas(config, cache_config(attention(2))) == (1,)


@needs_tensor_shards
def test_tensor_replicas_of_mla_is_all_ranks() -> None:
    specs = [attention(1, "MLAAttentionSpec", max_tp_shards=1)]
    assert tensor_replicas(engine(8, mla=True), cache_config(*specs)) == (8,)


@needs_tensor_shards
def test_tensor_replicas_of_an_unknown_mla_is_one() -> None:
    config = engine(8, mla=True, num_key_value_heads=1)
    assert tensor_replicas(config, cache_config(attention(1, "MLAAttentionSpec"))) == (1,)


def test_tensor_replicas_differ_by_group() -> None:
    if not has_name("v1.kv_cache_interface:MambaSpec.tp_replicated"):
        pytest.skip("vLLM before 0.29 does not note which states are equal on all ranks")
    specs = [attention(1), state(), state(replicated=True)]
    config = engine(4, num_key_value_heads=2)
    assert tensor_replicas(config, cache_config(*specs)) == (2, 1, 4)


@needs_tensor_shards
def test_tensor_replicas_of_one_group_with_several_layers_is_their_divisor() -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    layers = {
        "a": attention(1, "MLAAttentionSpec", max_tp_shards=1),
        "b": attention(1, "MLAAttentionSpec", max_tp_shards=2),
    }
    spec = UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs=layers)
    assert tensor_replicas(engine(4, mla=True), cache_config(spec)) == (2,)


def test_tensor_replicas_of_a_stage_without_layers_is_one() -> None:
    cache = cache_config(attention(1), layers=())
    assert tensor_replicas(engine(4, num_key_value_heads=1), cache) == (1,)


@needs_tensor_shards
@pytest.mark.parametrize(
    ("ranks", "spec", "config", "copies"),
    [
        (2, {"kind": "MLAAttentionSpec", "max_tp_shards": 1}, engine(2, mla=True), 1),
        (4, {}, engine(4, num_key_value_heads=2), 2),
        (2, {}, engine(2, num_key_value_heads=1), 1),
        (2, {}, engine(2, num_key_value_heads=2), 2),
    ],
    ids=["MLA", "two KV heads", "one KV head", "a KV head for each rank"],
)
def test_equal_bytes_of_several_ranks_are_stored_once_and_loaded_by_all(
    ranks: int, spec: dict[str, Any], config: Any, copies: int
) -> None:
    specs = layers(layer=(3, attention(1, **spec)))
    replicas = tensor_replicas(config, grouped_caches(specs).config)
    played = Ranks(specs, ranks, replicas=replicas)
    [parts], first = played.cut.parts, played.caches[0, 0]
    assert parts * played.cut.slot_nbytes <= 1.05 * copies * first.unpadded_nbytes(0)
    computed = {rank: caches.block_bytes(0, 3) for rank, caches in played.caches.items()}
    assert len(set(computed.values())) == copies
    played.run(Step(played.memory, stores=[Transfer(1, [3], [5])]))
    for caches in played.caches.values():
        caches.memory.zero_()
    played.run(Step(played.memory, loads=[Transfer(2, [4], [5])]))
    for rank, caches in played.caches.items():
        assert caches.block_bytes(0, 4) == computed[rank]
    played.close()
