"""Attention over restored blocks equals attention over the originals, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache import block_keys
from kvcache.connectors.paged import PagedCache, SaveResult
from kvcache.connectors.transfer.factory import Order
from tests.support.paged_caches import (
    KINDS,
    LATENT,
    Geometry,
    KeysAndValues,
    Kind,
    fill,
    keys_and_values,
    l1_stack,
    overwrite,
    same_blocks,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
BEFORE, AFTER = [7, 2, 11, 0, 5], [1, 10, 3, 8, 6]  # a sequence's blocks, saved and restored


def attention(
    parts: KeysAndValues, table: Sequence[int], tokens: int, groups: int = 2
) -> torch.Tensor:
    """Compute attention of 9 queries over the blocks of a sequence, in float32.

    Each head of K and V has `groups` query heads. fp8 is cast up, as in a kernel.
    """
    keys, values = (part[list(table)].flatten(0, 1)[:tokens].float() for part in parts)
    generator = torch.Generator().manual_seed(5)
    heads, dim = keys.shape[1] * groups, keys.shape[2]
    queries = torch.randn((1, heads, 9, dim), generator=generator)
    return scaled_dot_product_attention(
        queries, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], enable_gqa=True
    )


def round_trip(kind: Kind, g: Geometry, order: Order) -> None:
    layers = kind.make(g)
    fill(layers)
    tokens = 4 * g.tokens + 5  # the last block is not full
    computed = keys_and_values(kind, layers)
    expected = [attention(parts, BEFORE, tokens) for parts in computed]
    cache = PagedCache(layers, kind.layout, order=order)
    keys = block_keys(range(5 * g.tokens), g.tokens)
    with l1_stack(cache.block_nbytes) as stack, cache.attach(stack, threads=2) as attached:
        assert attached.save(BEFORE, keys) == SaveResult(stored=5, known=0, declined=0)
        overwrite(layers)
        assert attached.load(keys, AFTER) == 5
        assert stack.stats().pinned_slots == 0
    restored = keys_and_values(kind, layers)
    for parts, out in zip(restored, expected, strict=True):
        assert out.isfinite().all()
        assert torch.equal(attention(parts, AFTER, tokens), out)
    assert same_blocks(restored, AFTER, computed, BEFORE)  # also what the queries do not read


@pytest.mark.parametrize("order", ["raw", "canonical"])
@pytest.mark.parametrize("tokens", [16, 32, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *LATENT])
def test_attention_over_restored_blocks_is_the_same(
    kind: str, dtype: torch.dtype, tokens: int, order: Any
) -> None:
    heads = 1 if kind in LATENT else 2
    g = Geometry(tokens=tokens, heads=heads, dim=32, dtype=dtype)
    round_trip((KINDS | LATENT)[kind], g, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_over_restored_opaque_pages_is_the_same(dtype: torch.dtype) -> None:
    """The layout names only the axis of blocks."""
    kind = KINDS["packed"]
    round_trip(Kind("opaque", kind.make, kind.view), Geometry(dtype=dtype), "raw")


def test_round_trip_with_swapped_blocks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    from kvcache.connectors.transfer.cpu import CpuCopier

    scatter = CpuCopier.scatter

    def swapped(self: CpuCopier, slots: Any, blocks: Any, **options: Any) -> Any:
        return scatter(self, [slots[1], slots[0], *slots[2:]], blocks, **options)

    monkeypatch.setattr(CpuCopier, "scatter", swapped)
    with pytest.raises(AssertionError):
        round_trip(KINDS["kv-first"], Geometry(), "raw")
