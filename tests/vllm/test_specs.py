"""The namespace has the fields of a cache spec that change a block, the same on every vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1 import kv_cache_interface as vllm_specs

from kvcache.connectors.vllm.identity.specs import (
    BYTE_FIELDS,
    NEUTRAL_FIELDS,
    group_fields,
    spec_fields,
)

pytestmark = pytest.mark.engine

HEADS: dict[str, Any] = {
    "block_size": 16, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16
}  # fmt: skip
ATTENTION = {
    "block_size": 16, "num_kv_heads": 8, "head_size": 128, "head_size_v": 128,
    "dtype": "torch.bfloat16", "kv_quant_mode": "NONE", "num_head_slots": None,
    "state_content_bytes": None,
}  # fmt: skip
FULL = {"kind": "FullAttentionSpec", **ATTENTION} | {
    "sliding_window": None, "attention_chunk_size": None, "non_causal": False
}  # fmt: skip
LATENT = {"num_kv_heads": 1, "head_size": 576}

GOLDEN: dict[str, tuple[Any, dict[str, object]]] = {
    "full attention": (vllm_specs.FullAttentionSpec(**HEADS), FULL),
    "quantized": (
        vllm_specs.FullAttentionSpec(
            **HEADS | {"dtype": torch.uint8},
            kv_quant_mode=vllm_specs.KVQuantMode.FP8_PER_TENSOR,
        ),
        FULL | {"dtype": "torch.uint8", "kv_quant_mode": "FP8_PER_TENSOR"},
    ),
    "sliding window": (
        vllm_specs.SlidingWindowSpec(**HEADS, sliding_window=512),
        {"kind": "SlidingWindowSpec", **ATTENTION, "sliding_window": 512},
    ),
    "chunks": (
        vllm_specs.ChunkedLocalAttentionSpec(**HEADS, attention_chunk_size=8192),
        {"kind": "ChunkedLocalAttentionSpec", **ATTENTION, "attention_chunk_size": 8192},
    ),
    "MLA": (
        vllm_specs.MLAAttentionSpec(**HEADS | LATENT),
        FULL
        | LATENT
        | {"kind": "MLAAttentionSpec", "head_size_v": 0}
        | {"cache_dtype_str": None, "model_version": None},
    ),
    "state": (
        vllm_specs.MambaSpec(
            block_size=16,
            shapes=((4, 3), (2, 8, 8)),
            dtypes=(torch.bfloat16, torch.float32),
            mamba_cache_mode="align",
        ),
        {
            "kind": "MambaSpec", "block_size": 16, "shapes": [[4, 3], [2, 8, 8]],
            "dtypes": ["torch.bfloat16", "torch.float32"], "mamba_type": "MAMBA2",
            "mamba_cache_mode": "align",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "found"), GOLDEN.values(), ids=GOLDEN)
def test_spec_fields_of_a_fixed_spec_are_equal_on_every_vllm(
    spec: Any, found: dict[str, object]
) -> None:
    assert spec_fields(spec) == found


def test_group_fields_are_layers_and_their_spec() -> None:
    spec = vllm_specs.FullAttentionSpec(**HEADS)
    group: Any = SimpleNamespace(layer_names=("a", "b"), kv_cache_spec=spec)
    assert group_fields(group) == [["a", "b"], FULL]


def test_group_fields_of_layers_of_several_sizes_have_the_spec_of_each() -> None:
    small = vllm_specs.FullAttentionSpec(**HEADS | {"num_kv_heads": 1})
    every = {"a": vllm_specs.FullAttentionSpec(**HEADS), "b": small}
    wrapper = vllm_specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=every)
    assert spec_fields(wrapper) == {
        "kind": "UniformTypeKVCacheSpecs",
        "block_size": 16,
        "kv_cache_specs": {"a": FULL, "b": FULL | {"num_kv_heads": 1}},
    }


@pytest.mark.parametrize("name", sorted(NEUTRAL_FIELDS))
def test_spec_fields_leave_out_what_changes_no_byte(name: str) -> None:
    having = (spec for spec, _ in GOLDEN.values() if hasattr(spec, name))
    before = next(having, None)
    if before is None:
        pytest.skip("this vLLM has no such field")
    after = replace(before, **{name: 1 << 20})
    assert after != before or name == "is_draft"  # vLLM leaves this one out of comparisons
    assert spec_fields(after) == spec_fields(before)


@pytest.mark.parametrize("name", sorted(FULL.keys() - {"kind"}))
def test_spec_fields_change_with_each_field_of_bytes(name: str) -> None:
    before = vllm_specs.FullAttentionSpec(**HEADS)
    after = replace(before, **{name: 7})
    assert spec_fields(after) != spec_fields(before)


def test_byte_fields_and_neutral_fields_exclude_each_other() -> None:
    assert not BYTE_FIELDS & NEUTRAL_FIELDS


class Rotation(IntEnum):
    NONE = 0
    HALF = 1


@dataclass(frozen=True, kw_only=True)
class NewerSpec(vllm_specs.FullAttentionSpec):  # type: ignore[misc]
    """A spec of a vLLM that this version of kvcache does not know."""

    rotation: Rotation = Rotation.NONE
    ratio: Fraction = Fraction(1)
    parts: list[int] = field(default_factory=list)


def test_spec_fields_of_unknown_fields_with_their_defaults_change_nothing() -> None:
    assert spec_fields(NewerSpec(**HEADS)) == FULL | {"kind": "NewerSpec"}


def test_spec_fields_have_unknown_fields_with_another_value_than_the_default() -> None:
    found = spec_fields(
        NewerSpec(**HEADS, rotation=Rotation.HALF, ratio=Fraction(1, 2), parts=[1, 2])
    )
    more = {"rotation": "HALF", "ratio": "1/2", "parts": [1, 2]}
    assert found == FULL | {"kind": "NewerSpec", **more}
