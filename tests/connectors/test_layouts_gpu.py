"""The kernels of attention libraries over restored blocks, where a GPU and the libraries exist.

The engine's cache is on the GPU. It is saved, overwritten and loaded into other blocks. Each kernel
must compute the same bits over the original cache and over the restored one, and nearly what torch
computes over K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache import block_keys
from kvcache.connectors.paged import PagedCache
from tests.support.paged_caches import KINDS, Geometry, fill, keys_and_values, l1_stack, overwrite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# flash-attn takes pages of a multiple of 256 tokens, and the others of any power of two.
TOKENS, HEADS, DIM = 256, 4, 128
BEFORE, AFTER = [3, 0, 2], [5, 1, 4]
LENGTH = 2 * TOKENS + 77
Cache = Any
Kernel = Callable[[torch.Tensor, Cache, Sequence[int]], torch.Tensor]


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def flash_attn(queries: torch.Tensor, cache: Cache, table: Sequence[int]) -> torch.Tensor:
    module = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    keys, values = cache
    out: torch.Tensor = module.flash_attn_with_kvcache(
        queries[:, None], keys, values, cache_seqlens=integers(LENGTH),
        block_table=integers(*table)[None],
    )  # fmt: skip
    return out[:, 0]


def xformers(queries: torch.Tensor, cache: Cache, table: Sequence[int]) -> torch.Tensor:
    fmha = pytest.importorskip("xformers.ops.fmha", reason="xFormers is not installed")
    keys, values = (part.flatten(0, 1)[None] for part in cache)  # [1, blocks * tokens, heads, dim]
    bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1], kv_seqlen=[LENGTH], page_size=TOKENS, block_tables=integers(*table)[None]
    )
    out: torch.Tensor = fmha.memory_efficient_attention_forward(
        queries[None], keys, values, attn_bias=bias
    )
    return out[0]


def flashinfer(layout: str) -> Kernel:
    def kernel(queries: torch.Tensor, cache: Cache, table: Sequence[int]) -> torch.Tensor:
        module = pytest.importorskip("flashinfer", reason="FlashInfer is not installed")
        workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, layout)
        wrapper.plan(
            integers(0, len(table)), integers(*table), integers(LENGTH - (len(table) - 1) * TOKENS),
            HEADS, HEADS, DIM, TOKENS,
            q_data_type=queries.dtype, kv_data_type=queries.dtype,
        )  # fmt: skip
        out: torch.Tensor = wrapper.run(queries, cache)
        return out

    return kernel


@dataclass(frozen=True)
class Case:
    """A kernel and the kind of cache that it reads."""

    kernel: Kernel
    kind: str


CASES = {
    "flash-attn": Case(flash_attn, "pair"),
    "xFormers": Case(xformers, "pair"),
    "FlashInfer NHD": Case(flashinfer("NHD"), "blocks-first"),
    "FlashInfer HND": Case(flashinfer("HND"), "blocks-first-hnd"),
    "FlashInfer NHD, K and V apart": Case(flashinfer("NHD"), "pair"),
    "FlashInfer HND, K and V apart": Case(flashinfer("HND"), "pair-hnd"),
}


@pytest.mark.parametrize("order", ["raw", "canonical"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_over_restored_blocks_computes_the_same(
    name: str, dtype: torch.dtype, order: Any
) -> None:
    case, kind = CASES[name], KINDS[CASES[name].kind]
    g = Geometry(2, 6, TOKENS, HEADS, DIM, dtype, device="cuda")
    engine = kind.make(g)
    fill(engine)
    queries = torch.randn((1, HEADS, DIM), generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = [case.kernel(queries.cuda(), layer, BEFORE) for layer in engine]

    cache = PagedCache(engine, kind.layout, order=order, tokens=TOKENS)
    keys = block_keys(range(3 * TOKENS), TOKENS)
    with l1_stack(cache.block_nbytes) as stack, cache.attach(stack) as attached:
        assert attached.save(BEFORE, keys).stored == 3
        overwrite(engine)
        assert attached.load(keys, AFTER) == 3
    for layer, parts, out in zip(engine, keys_and_values(kind, engine), expected, strict=True):
        assert torch.equal(case.kernel(queries.cuda(), layer, AFTER), out)
        key_part, values = (part[AFTER].flatten(0, 1)[:LENGTH].cpu().float() for part in parts)
        reference = scaled_dot_product_attention(
            queries[0].float()[:, None], key_part.transpose(0, 1), values.transpose(0, 1)
        )
        torch.testing.assert_close(out.cpu().float(), reference.transpose(0, 1), atol=2e-2, rtol=0)
