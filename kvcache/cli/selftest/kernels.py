"""The attention kernels that `kvcache selftest` runs over restored pages: one class for each.

A kernel reads pages in place through a block table. Its package is imported when it first runs.
The calls follow the signatures of flash-attn 2.8, xFormers 0.0.32 and FlashInfer 0.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

from kvcache.cli.selftest.samples import Layer, Sample, Tensor

_KV_APART = frozenset(
    {"kv-first", "kv-first-hnd", "blocks-first", "blocks-first-hnd", "pair", "pair-hnd"}
)
"""The layouts in which a vector of a token and a head is contiguous, and K is not packed with V."""

_WORKSPACE_NBYTES = 128 << 20  # FlashInfer recommends this size


class AttentionKernel(ABC):
    """A kernel that computes attention over the pages of one sequence.

    Attributes:
        name: of the kernel.
        module: the module that it needs.
        requirement: the argument of `pip install` that installs the module.
        needs_gpu: whether it runs on CUDA devices only.
        layouts: the names of the layouts that it reads in place; None if it reads all.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    requirement: ClassVar[str]
    needs_gpu: ClassVar[bool] = True
    layouts: ClassVar[frozenset[str] | None]

    def obstacle(self, device: str) -> str:
        """Return why this kernel does not run on `device`; empty if it does."""
        if find_spec(self.module) is None:
            return f"not installed: pip install '{self.requirement}'"
        if self.needs_gpu and device == "cpu":
            return "needs a GPU"
        return ""

    def reads(self, layout: str) -> bool:
        """Return whether it reads pages in this layout."""
        return self.layouts is None or layout in self.layouts

    @abstractmethod
    def attend(
        self, queries: Tensor, sample: Sample, layer: Layer, table: Sequence[int], length: int
    ) -> Tensor:
        """Compute attention of one token over the first `length` tokens of the pages in `table`.

        Args:
            queries: `[heads, dim]`.
            layer: one of the layers of `sample`.

        Returns:
            `[heads, dim of V]`.
        """


class TorchKernel(AttentionKernel):
    """torch's scaled dot product attention, over pages that are gathered first."""

    name = "torch"
    module = "torch"
    requirement = "kvcache[torch]"
    needs_gpu = False
    layouts = None

    def attend(
        self, queries: Tensor, sample: Sample, layer: Layer, table: Sequence[int], length: int
    ) -> Tensor:
        from torch.nn.functional import scaled_dot_product_attention

        blocks = _integers(queries, table)
        keys, values = (
            part.index_select(0, blocks).flatten(3).flatten(0, 1)[:length].transpose(0, 1)[None]
            for part in sample.keys_and_values(layer)
        )
        return scaled_dot_product_attention(queries[None, :, None], keys, values)[0, :, 0]


class FlashAttention(AttentionKernel):
    """flash-attn, which reads K and V by their strides."""

    name = "flash-attn"
    module = "flash_attn"
    requirement = "kvcache[flash-attn]"
    layouts = _KV_APART | {"packed"}

    def attend(
        self, queries: Tensor, sample: Sample, layer: Layer, table: Sequence[int], length: int
    ) -> Tensor:
        from flash_attn import flash_attn_with_kvcache

        keys, values = sample.keys_and_values(layer)
        out = flash_attn_with_kvcache(
            queries[None, None],
            keys,
            values,
            cache_seqlens=_integers(queries, [length]),
            block_table=_integers(queries, table)[None],
        )
        return out[0, 0]


class Xformers(AttentionKernel):
    """xFormers, for which pages and their tokens are one axis."""

    name = "xformers"
    module = "xformers"
    requirement = "kvcache[xformers]"
    layouts = frozenset({"kv-first", "pair"})

    def attend(
        self, queries: Tensor, sample: Sample, layer: Layer, table: Sequence[int], length: int
    ) -> Tensor:
        from xformers.ops import fmha

        views = sample.keys_and_values(layer)
        page_size = views[0].shape[1]
        keys, values = (part.flatten(0, 1)[None] for part in views)
        bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[1],
            kv_seqlen=[length],
            page_size=page_size,
            block_tables=_integers(queries, table)[None],
        )
        out = fmha.memory_efficient_attention_forward(
            queries[None, None], keys, values, attn_bias=bias
        )
        return out[0, 0]


class Flashinfer(AttentionKernel):
    """FlashInfer, which reads K and V in one tensor or in two."""

    name = "flashinfer"
    module = "flashinfer"
    requirement = "flashinfer-python"
    layouts = _KV_APART

    def __init__(self) -> None:
        self._wrappers: dict[str, Any] = {}  # by the order of a page; each has a workspace

    def attend(
        self, queries: Tensor, sample: Sample, layer: Layer, table: Sequence[int], length: int
    ) -> Tensor:
        import torch
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        order = "HND" if sample.layout.endswith("-hnd") else "NHD"
        if order not in self._wrappers:
            workspace = torch.zeros(_WORKSPACE_NBYTES, dtype=torch.uint8, device=queries.device)
            self._wrappers[order] = BatchDecodeWithPagedKVCacheWrapper(workspace, order)
        keys, _ = sample.keys_and_values(layer)
        _, tokens, heads, dim = keys.shape
        wrapper = self._wrappers[order]
        wrapper.plan(
            _integers(queries, [0, len(table)]),
            _integers(queries, table),
            _integers(queries, [length - (len(table) - 1) * tokens]),
            heads,
            heads,
            dim,
            tokens,
            q_data_type=queries.dtype,
            kv_data_type=queries.dtype,
        )
        pages = tuple(layer) if sample.layout.startswith("kv-first") else layer
        return wrapper.run(queries[None], pages)[0]


KERNELS: Mapping[str, AttentionKernel] = {
    kernel.name: kernel for kernel in (TorchKernel(), FlashAttention(), Xformers(), Flashinfer())
}


def _integers(like: Tensor, values: Sequence[int]) -> Tensor:
    """Return 32-bit integers on the device of `like`."""
    import torch

    return torch.tensor(values, dtype=torch.int32, device=like.device)
