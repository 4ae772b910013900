"""What makes two engines' blocks each other's: all of it is in the namespace, and no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.support import identity
from kvcache.keys import namespace

pytestmark = pytest.mark.engine


def space(
    *,
    model: str = "meta/llama",
    revision: str = "main",
    config: str = '{"layers": 2}',
    dtype: str = "torch.bfloat16",
    quantization: str | None = None,
    cache_dtype: str = "auto",
    algorithm: str = "sha256",
    layout: str = "LBHNC",
    block_tokens: int = 32,
    heads: int = 2,
    layers: tuple[str, ...] = ("one", "two"),
    tensor: int = 1,
    pipeline: int = 1,
    served: str = "chat",
) -> bytes:
    """The namespace of an engine with these settings."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=heads, head_size=32, dtype=torch.bfloat16
    )
    engine: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            model=model,
            revision=revision,
            hf_config=SimpleNamespace(to_json_string=lambda: config),
            dtype=dtype,
            quantization=quantization,
            served_model_name=served,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=pipeline, tensor_parallel_size=tensor
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype, prefix_caching_hash_algo=algorithm),
    )
    cache: Any = SimpleNamespace(
        kv_cache_layout=layout,
        kv_cache_groups=[SimpleNamespace(layer_names=list(layers), kv_cache_spec=spec)],
    )
    return namespace(identity(engine, cache))


@pytest.mark.parametrize(
    "other",
    [
        {"model": "meta/llama-2"},
        {"revision": "v2"},
        {"config": '{"layers": 3}'},
        {"dtype": "torch.float16"},
        {"quantization": "fp8"},
        {"cache_dtype": "fp8"},
        {"algorithm": "sha256_cbor"},
        {"layout": "BLHNC"},
        {"block_tokens": 64},
        {"heads": 4},
        {"layers": ("one",)},
        {"tensor": 2},
        {"pipeline": 2},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_in_bytes_never_meets(other: dict[str, Any]) -> None:
    assert space(**other) != space()


def test_what_seeds_the_hashes_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    seeded = space()
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert space() != seeded


def test_engines_of_one_kind_meet() -> None:
    """Whatever they are called; what a salt or a LoRA changes is in vLLM's hashes of the blocks."""
    assert space() == space()
    assert space(served="another name") == space()
