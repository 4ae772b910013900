"""Tests of several KV cache groups on each vLLM: skips where hooks lack, and moved modules."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from kvcache.connectors.vllm.compat import hooks_refusal
from kvcache.connectors.vllm.vllm_names import has_name

needs_group_hooks = pytest.mark.skipif(
    hooks_refusal([], states=True) is not None, reason="vLLM before 0.30 refuses these models"
)
needs_tensor_shards = pytest.mark.skipif(
    not has_name("v1.kv_cache_interface:AttentionSpec.max_tp_shards"),
    reason="vLLM before 0.31 does not note on how many ranks a layer's KV differs",
)


def kv_cache_planning() -> Any:
    """Return vLLM's module with `get_kv_cache_groups` and `get_kv_cache_config_from_groups`."""
    from vllm.v1.core import kv_cache_utils

    if hasattr(kv_cache_utils, "get_kv_cache_groups"):
        return kv_cache_utils
    return import_module("vllm.v1.core.kv_cache_planning")  # from 0.33 on
