"""Skip tests of several KV cache groups on a vLLM without the hooks that they need."""

from __future__ import annotations

import pytest

from kvcache.connectors.vllm.compat import has_name, hooks_refusal

needs_group_hooks = pytest.mark.skipif(
    hooks_refusal([], states=True) is not None, reason="vLLM before 0.30 refuses these models"
)
needs_tensor_shards = pytest.mark.skipif(
    not has_name("v1.kv_cache_interface:AttentionSpec.max_tp_shards"),
    reason="vLLM before 0.31 does not note on how many ranks a layer's KV differs",
)
