"""kvcache's tiers below vLLM's own offloading: vLLM imports ``KVCacheTier`` from here.

::

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": 10737418240,
        "secondary_tiers": [{"type": "KVCacheTier",
                             "module_path": "kvcache.connectors.vllm.secondary",
                             "profile": "l1-disk"}]}}'

vLLM copies between the GPU and its own host memory, the primary tier. A secondary tier copies
between that memory and what lies below it. vLLM constructs the class in the scheduler's process,
and imports it in the process that serves ``/metrics`` too: importing this package starts nothing.
"""

from __future__ import annotations

try:
    import vllm
except ImportError as error:
    raise ImportError("the vLLM connector needs vLLM in this environment") from error

from kvcache.connectors.vllm.compat import check_vllm
from kvcache.connectors.vllm.vllm_names import SECONDARY_TIERS, has_name

check_vllm(vllm.__version__)
if not has_name(SECONDARY_TIERS):
    raise ImportError(
        f"tiers below vLLM's own offloading need vLLM 0.32 or newer; this is {vllm.__version__}"
    )

from kvcache.connectors.vllm.secondary.tier import KVCacheTier  # noqa: E402

__all__ = ["KVCacheTier"]
