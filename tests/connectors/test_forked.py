"""A forked child cannot copy through its parent's connectors, nor close them."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch

from kvcache import block_keys
from kvcache.connectors.paged import PagedCache
from tests.support.forked_children import methods_usable_in_child, run_in_child
from tests.support.paged_caches import Geometry, opened

G = Geometry(layers=2, blocks=8, tokens=16, heads=2, dim=16)
KEYS = block_keys(range(4 * 16), 16)


def layers() -> list[torch.Tensor]:
    return [torch.randn(2, 8, 16, 2, 16, dtype=torch.bfloat16) for _ in range(2)]


def test_attached_cache_in_a_child_is_refused_and_the_parents_blocks_stay() -> None:
    ours = layers()
    cache = PagedCache(ours, "kv-first")
    with opened(cache.block_nbytes, 16) as stack, cache.attach(stack, threads=2) as kept:
        assert kept.save([0, 1, 2, 3], KEYS).stored == 4
        before = [layer[:, :4].clone() for layer in ours]
        assert methods_usable_in_child(kept, kept._copier) == []
        assert kept.load(KEYS, [4, 5, 6, 7]) == 4
        assert all(torch.equal(a[:, 4:], b) for a, b in zip(ours, before, strict=True))


def test_child_keeps_blocks_of_its_own_in_a_stack_of_its_own() -> None:
    ours = layers()
    cache = PagedCache(ours, "kv-first")
    with opened(cache.block_nbytes, 16) as stack, cache.attach(stack) as kept:
        assert kept.save([0, 1], KEYS[:2]).stored == 2

        def child() -> bool:  # whose tensors are a copy, on a CPU
            with opened(cache.block_nbytes, 16) as stack, cache.attach(stack) as kept:
                return kept.save([0], KEYS[:1]).held == 1 and kept.load(KEYS[:1], [5]) == 1

        assert run_in_child(child) is True
