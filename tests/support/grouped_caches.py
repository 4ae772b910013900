"""The KV cache of a model with several KV cache groups, grouped and allocated by vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from kvcache.connectors.vllm.vllm_names import has_name
from tests.support.group_hooks import kv_cache_planning

BLOCK = 32  # tokens


def full(heads: int = 2, **options: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=heads, head_size=32, dtype=torch.bfloat16, **options
    )


def window(heads: int = 2, tokens: int = 64) -> Any:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(
        block_size=BLOCK,
        num_kv_heads=heads,
        head_size=32,
        dtype=torch.bfloat16,
        sliding_window=tokens,
    )


def state(numbers: int = 1200) -> Any:
    """A state of so many floats, and 154 bytes of another type."""
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(
        block_size=BLOCK,
        shapes=((numbers,), (7, 11)),
        dtypes=(torch.float32, torch.bfloat16),
        mamba_cache_mode="align",
    )


def layers(**counts_and_specs: tuple[int, Any]) -> dict[str, Any]:
    """Return specs by layer: ``layers(full=(2, full()))`` has `full0` and `full1`."""
    return {
        f"{name}{number}": spec
        for name, (count, spec) in counts_and_specs.items()
        for number in range(count)
    }


@dataclass
class GroupedCaches:
    """What vLLM passes to a connector: its config of groups, and the tensors of all layers."""

    config: Any
    caches: dict[str, torch.Tensor]

    @property
    def memory(self) -> torch.Tensor:
        """The bytes of the whole allocation, which all layers share."""
        storage = next(iter(self.caches.values())).untyped_storage()
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def clone(self) -> GroupedCaches:
        """Return a copy of the allocation, with views of it."""
        storage = self.memory.clone().untyped_storage()
        caches = {
            name: torch.empty(0, dtype=cache.dtype).set_(
                storage, cache.storage_offset(), cache.shape, cache.stride()
            )
            for name, cache in self.caches.items()
        }
        return GroupedCaches(self.config, caches)

    def pages(self, group: int, block: int) -> list[torch.Tensor]:
        """Return the pages of a block of one of vLLM's groups, with axes in order of memory."""
        result = []
        for name in self.config.kv_cache_groups[group].layer_names:
            page = self.caches[name].unflatten(0, (self.config.num_blocks, -1))[block]
            axes = sorted(range(page.dim()), key=page.stride, reverse=True)
            result.append(page.permute(axes))
        return result

    def block_bytes(self, group: int, block: int) -> bytes:
        """Return the pages of a block, one after another."""
        return b"".join(
            page.contiguous().view(torch.uint8).numpy().tobytes()
            for page in self.pages(group, block)
        )

    def write_block(self, group: int, block: int, begin: int, data: bytes) -> None:
        """Overwrite the bytes of a block from byte ``begin`` on."""
        content = bytearray(self.block_bytes(group, block))
        content[begin : begin + len(data)] = data
        at = 0
        for page in self.pages(group, block):
            count = page.numel() * page.element_size()
            new = torch.frombuffer(content[at : at + count], dtype=torch.uint8)
            page.copy_(new.view(page.dtype).view(page.shape))
            at += count

    def unpadded_nbytes(self, group: int) -> int:
        """Return the bytes of a block of one of vLLM's groups by its specs, without padding."""
        from dataclasses import replace

        of = self.config.kv_cache_groups[group]
        specs = getattr(of.kv_cache_spec, "kv_cache_specs", {})
        return sum(
            replace(specs.get(name, of.kv_cache_spec), page_size_padded=None).page_size_bytes
            for name in of.layer_names
        )


def grouped_caches(
    specs: Mapping[str, Any], *, blocks: int = 8, layout: str = "LBHNC"
) -> GroupedCaches:
    """Have vLLM make groups of layers with these specs, and allocate random memory for them."""
    if not has_name("v1.kv_cache_interface:KVCacheLayout"):
        pytest.skip("vLLM before 0.29 has no layouts of the KV cache")
    from vllm.v1.kv_cache_interface import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    chosen = KVCacheLayout[layout]
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: chosen,
        num_gpu_blocks_override=blocks,
        prefix_cache_retention_interval=None,
        block_size=BLOCK,
        enable_prefix_caching=True,
        mamba_cache_mode="align",
    )
    vllm_config: Any = SimpleNamespace(
        cache_config=cache,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        model_config=SimpleNamespace(hf_config=SimpleNamespace()),
    )
    planning = kv_cache_planning()
    groups = planning.get_kv_cache_groups(vllm_config, dict(specs))
    config = planning.get_kv_cache_config_from_groups(vllm_config, groups, 1 << 40)
    caches = GroupedCaches(config, allocate_kv_cache(config, torch.device("cpu"), chosen))
    caches.memory.random_(0, 256)
    return caches
