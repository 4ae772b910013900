"""Store, wipe, load elsewhere: attention over what came back is attention over what was there."""

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
    Kind,
    Seen,
    compute,
    meaning,
    opened,
    same,
    wipe,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
BEFORE, AFTER = [7, 2, 11, 0, 5], [1, 10, 3, 8, 6]  # where a sequence lies, and where it comes back


def attention(seen: Seen, table: Sequence[int], tokens: int, groups: int = 2) -> torch.Tensor:
    """A decode step and a chunk of a prefill over the blocks of a sequence, in float32.

    `groups` query heads go with each head of K and V. fp8 is cast up, as a kernel does.
    """
    keys, values = (part[list(table)].flatten(0, 1)[:tokens].float() for part in seen)
    generator = torch.Generator().manual_seed(5)
    heads, dim = keys.shape[1] * groups, keys.shape[2]
    queries = torch.randn((1, heads, 9, dim), generator=generator)
    return scaled_dot_product_attention(
        queries, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], enable_gqa=True
    )


def round_trip(kind: Kind, g: Geometry, order: Order) -> None:
    layers = kind.make(g)
    compute(layers)
    tokens = 4 * g.tokens + 5  # the last block is not full, for the kernel's sake
    computed = meaning(kind, layers)
    expected = [attention(seen, BEFORE, tokens) for seen in computed]
    cache = PagedCache(layers, kind.layout, order=order)
    keys = block_keys(range(5 * g.tokens), g.tokens)
    with opened(cache.block_nbytes) as stack, cache.attach(stack, threads=2) as kept:
        assert kept.save(BEFORE, keys) == SaveResult(stored=5, known=0, declined=0)
        wipe(layers)
        assert kept.load(keys, AFTER) == 5
        assert stack.stats().pinned_slots == 0
    restored = meaning(kind, layers)
    for seen, out in zip(restored, expected, strict=True):
        assert out.isfinite().all()
        assert torch.equal(attention(seen, AFTER, tokens), out)
    assert same(restored, AFTER, computed, BEFORE)  # all of K and V, not what queries look at


@pytest.mark.parametrize("order", ["raw", "canonical"])
@pytest.mark.parametrize("tokens", [16, 32, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *LATENT])
def test_attention_is_the_same(kind: str, dtype: torch.dtype, tokens: int, order: Any) -> None:
    heads = 1 if kind in LATENT else 2
    g = Geometry(tokens=tokens, heads=heads, dim=32, dtype=dtype)
    round_trip((KINDS | LATENT)[kind], g, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opaque_pages(dtype: torch.dtype) -> None:
    """Whatever a block is made of: here K and V packed by a processor, as nobody knows how."""
    kind = KINDS["packed"]
    round_trip(Kind("opaque", kind.make, kind.see), Geometry(dtype=dtype), "raw")


def test_the_proof_finds_a_block_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcache.connectors.transfer.cpu import CpuCopier

    right = CpuCopier._scatter

    def swapped(self: CpuCopier, slots: Any, blocks: Any, *when: Any) -> Any:
        return right(self, slots[[1, 0, *range(2, len(slots))]], blocks, *when)

    monkeypatch.setattr(CpuCopier, "_scatter", swapped)
    with pytest.raises(AssertionError):
        round_trip(KINDS["kv-first"], Geometry(), "raw")
