"""Which layout of the KV cache the connector requests from vLLM: blocks outermost, on CUDA.

With blocks outermost (vLLM's layouts BLNHC and BLHNC) the pages of all layers of a block lie
together, so a block is copied as one run in place of one for each layer. vLLM treats the request as
a preference: if an attention backend does not support the layout, vLLM logs a warning and uses
another one. The environment variable `VLLM_KV_CACHE_LAYOUT` has priority over the request.

Invariants:

1. The request stops no engine. vLLM raises an error if two connectors under `MultiConnector`
   request different layouts, or if a backend has to split the blocks of such a layout, so the
   connector requests none in these cases.
2. The bytes of a page are those of the layout that vLLM chooses without a request: tokens outside
   heads in memory (N before H), unless the backend prefers heads outside tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from kvcache.connectors.vllm.vllm_names import LAYOUTS, has_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_RESOLUTION: Final = "vllm.distributed.kv_transfer.kv_connector.utils"
"""The module of vLLM that asks the only connector of an engine for a layout."""

_UNSPLIT_BLOCKS: Final = (16, 32, 64)
"""Block sizes that no CUDA backend of vLLM 0.29 to 0.33 splits. FlashInfer splits larger ones."""

_HEADS_FIRST_ARCHITECTURE: Final = 10
"""Major compute capability of the GPUs on which FlashInfer reads heads before tokens (BLHNC)."""


def requested_layout(vllm_config: VllmConfig, caller: str) -> str | None:
    """Return the name of a layout with blocks outermost; ``None`` for vLLM's own choice.

    Args:
        vllm_config: of the engine.
        caller: name of the module that asks.
    """
    from vllm.platforms import current_platform

    if (
        not has_name(LAYOUTS)
        or caller != _RESOLUTION
        or not current_platform.is_cuda()
        or _may_split_blocks(vllm_config)
    ):
        return None
    return next(
        (name for name in _supported_layouts(vllm_config) if name in ("BLNHC", "BLHNC")), None
    )


def _may_split_blocks(vllm_config: VllmConfig) -> bool:
    """Whether an attention backend may use smaller blocks than vLLM's KV cache manager."""
    model, cache, attention = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.attention_config,
    )
    return (
        model is None
        or model.is_hybrid  # the block size fits the states
        # The block size fits several data types.
        or bool(getattr(cache, "kv_cache_dtype_skip_layers", ()))
        or getattr(attention, "hisparse_config", None) is not None
        # If the user chooses no block size, vLLM chooses one that all backends support.
        or (cache.user_specified_block_size and cache.block_size not in _UNSPLIT_BLOCKS)
    )


def _supported_layouts(vllm_config: VllmConfig) -> Sequence[str]:
    """Return names of layouts, preferred ones first.

    They are those of the backend that the user chose. Otherwise the backends are known in the
    workers only, and the result is what the default backends support.
    """
    from vllm.platforms import current_platform

    backend: Any = getattr(vllm_config.attention_config, "backend", None)
    if backend is not None:
        try:
            layouts = backend.get_class().supported_kv_cache_layouts()
        except Exception:  # noqa: BLE001 - vLLM reports a backend that cannot be imported
            return ()
        return ("BLNHC",) if layouts is None else [layout.name for layout in layouts]
    capability = current_platform.get_device_capability()
    heads_first = capability is not None and capability.major == _HEADS_FIRST_ARCHITECTURE
    return ("BLHNC",) if heads_first else ("BLNHC",)
