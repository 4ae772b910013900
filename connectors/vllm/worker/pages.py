"""Where the pages of vLLM's KV cache lie on one rank, for each of vLLM's groups.

All groups share block ids and memory: a page of one group's layer has the address of a page of
another group's, and a block id belongs to one group at a time.

Invariants:

1. A rank's shard of a block is the pages of the group's layers, one after another, in the order of
   the group's layer names. Padding between pages is not in it.
2. Caches under other names are aliases of these layers, and are ignored.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvcache.connectors.layout.axes import LayoutError
from kvcache.connectors.layout.placement import BlockRun, Placement, cut_runs, place
from kvcache.connectors.transfer.factory import format_id
from kvcache.connectors.vllm.groups import kept_groups

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec


class RankPages:
    """The pages of the kept groups' layers, as vLLM registered them.

    Args:
        kv_cache_config: the worker's.
        caches: by name of the layer.

    Attributes:
        nbytes: of the shard of one block of each of vLLM's groups; 0 for one without layers on
            this rank, and for one that is not kept.
        layers: numbers of the layers, by name.
        placements: of each of vLLM's groups with layers that are kept; at least one.

    Raises:
        LayoutError: if a cache is no tensor, or its pages cannot be copied.
    """

    def __init__(self, kv_cache_config: KVCacheConfig, caches: Mapping[str, torch.Tensor]) -> None:
        groups, blocks = kv_cache_config.kv_cache_groups, kv_cache_config.num_blocks
        kept = {number for group in kept_groups(kv_cache_config) for number in group.members}
        self.layers: dict[str, int] = {}
        self.placements: list[Placement] = []
        self._runs: list[list[BlockRun]] = [[] for _ in groups]
        for number, group in enumerate(groups):
            if number not in kept or not group.layer_names:
                continue
            first = len(self.layers)
            placement = place_caches({name: caches[name] for name in group.layer_names}, blocks)
            self.placements.append(placement)
            self._runs[number] = _unpadded_runs(group, placement, first)
            self.layers |= {name: first + at for at, name in enumerate(group.layer_names)}
        if not self.placements:
            raise LayoutError("no layer of this rank has blocks that are kept")
        if len(devices := {placement.device for placement in self.placements}) > 1:
            raise LayoutError(f"the KV cache is on several devices: {', '.join(sorted(devices))}")
        self.nbytes = tuple(sum(run.nbytes for run in runs) for runs in self._runs)

    @property
    def element_nbytes(self) -> int:
        """Bytes of an element of the caches; of the widest, if they differ."""
        return max(placement.element_nbytes for placement in self.placements)

    @property
    def format_id(self) -> str:
        """The meaning of a shard's bytes."""
        formats = [format_id(placement) for placement in self.placements]
        return str(formats[0] if len(formats) == 1 else formats)

    def runs(self, member: int, begin: int, end: int) -> list[BlockRun]:
        """Return the runs of bytes ``begin`` to ``end`` of a shard of vLLM's group ``member``."""
        return cut_runs(self._runs[member], begin, end)


def place_caches(caches: Mapping[str, torch.Tensor], blocks: int) -> Placement:
    """Return where the blocks of these layers lie.

    Args:
        caches: by name, the views that vLLM registers: ``[blocks * n, ...]``, n kernel blocks to
            a block. Only their attention knows what the other axes mean, so pages are opaque.
        blocks: of the engine's cache.

    Raises:
        LayoutError: if a cache is no tensor or does not have this many blocks, or cannot be copied
            run by run.
    """
    for name, cache in caches.items():
        if isinstance(cache, Sequence):
            raise LayoutError(
                f"the KV cache of layer {name} is {len(cache)} tensors; only one can be copied"
            )
        if not cache.shape[0] or cache.shape[0] % blocks:
            raise LayoutError(
                f"the KV cache of layer {name}, shape {tuple(cache.shape)}, strides "
                f"{cache.stride()}, is not {blocks} blocks"
            )
    views = {name: cache.unflatten(0, (blocks, -1)) for name, cache in caches.items()}
    return place(views, "opaque")


def host_format() -> str:
    """Return the properties of a CPU that change the bytes of a page, but not its tensor.

    Attention packs keys and values for the instruction set that it runs on.
    """
    import torch

    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx={amx}"


def _unpadded_runs(
    group: KVCacheGroupSpec, placement: Placement, first_layer: int
) -> list[BlockRun]:
    """Return the runs of a group's block, with layers numbered from ``first_layer``."""
    by_layer: list[list[BlockRun]] = [[] for _ in group.layer_names]
    for run in placement.runs():
        by_layer[run.layer].append(run)
    runs = []
    for at, (name, layer) in enumerate(zip(group.layer_names, by_layer, strict=True)):
        nbytes = _state_nbytes(layer_spec(group.kv_cache_spec, name))
        unpadded = layer if nbytes is None else cut_runs(layer, 0, nbytes)
        runs += [replace(run, layer=first_layer + at) for run in unpadded]
    return runs


def layer_spec(spec: Any, name: str) -> Any:
    """Return the cache spec of one layer of a group."""
    by_layer = getattr(spec, "kv_cache_specs", None)  # layers of one type and several sizes
    return by_layer[name] if by_layer is not None else spec


def _state_nbytes(spec: Any) -> int | None:
    """Return the bytes of a state without the padding at the end of its page.

    ``None`` for attention: its views leave the padding out.
    """
    from vllm.v1.kv_cache_interface import MambaSpec

    if not isinstance(spec, MambaSpec):
        return None
    nbytes: int = replace(spec, page_size_padded=None).page_size_bytes
    return nbytes
