"""Cache specs: the fields of vLLM's specs that change the bytes of a block or their meaning.

vLLM describes the cache of a layer by a dataclass, its cache spec, and adds fields to these classes
in most versions. Of a spec, the namespace has

* the fields of `BYTE_FIELDS`;
* of the other fields, apart from `NEUTRAL_FIELDS`, those with another value than their default.

So a field that a newer vLLM adds changes no namespace while it has its default. With another value
it separates the engine from engines without it, even if this module does not know the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

BYTE_FIELDS: Final = frozenset(
    {
        "block_size",
        # Attention
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "num_head_slots",
        "state_content_bytes",
        "dtype",
        "kv_quant_mode",
        "sliding_window",
        "attention_chunk_size",
        "non_causal",
        # MLA
        "cache_dtype_str",
        "model_version",
        # States
        "shapes",
        "dtypes",
        "mamba_type",
        "mamba_cache_mode",
        # One spec for each layer
        "kv_cache_specs",
    }
)
"""Fields of vLLM 0.28 to 0.33 that every namespace has, where the spec has them."""

NEUTRAL_FIELDS: Final = frozenset(
    {
        # Padding: a block is stored without it
        "page_size_padded",
        "alignment",
        "block_stride_alignment",
        "indexes_kv_by_block_stride",
        # Which ranks have equal or other parts: the namespace has the ranks, and their replicas
        "max_tp_shards",
        "dcp_sharded",
        # How many blocks a request has, and for how long
        "extra_retained_tokens",
        "num_speculative_blocks",
        "num_prefill_checkpoint_blocks",
        "prefill_checkpoint_alignment",
        # Which model a layer belongs to: the layer's name has it
        "is_draft",
    }
)
"""Fields of vLLM 0.28 to 0.33 that change neither the bytes of a block nor their meaning."""


def group_fields(group: KVCacheGroupSpec) -> list[object]:
    """Return the layers of a group and the fields of their spec, as values that JSON has."""
    return [list(group.layer_names), spec_fields(group.kv_cache_spec)]


def spec_fields(spec: Any) -> dict[str, object]:
    """Return the kind of a cache spec, and its fields by name."""
    found: dict[str, object] = {"kind": type(spec).__name__}
    for field in fields(spec):
        if field.name in NEUTRAL_FIELDS:
            continue
        value = getattr(spec, field.name)
        if field.name in BYTE_FIELDS or value != _default(field):
            found[field.name] = _plain(value)
    return found


def _default(field: Field[Any]) -> object:
    """Return the default of a field; `MISSING` without one."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> object:
    """Return a value as JSON has it; of an unknown type, its text."""
    if isinstance(value, Enum):  # its number may mean something else in another version
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return spec_fields(value) if is_dataclass(value) else str(value)
