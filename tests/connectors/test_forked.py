"""A forked child can neither copy with its parent's paged caches nor close them."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba")

import torch

from kvcache import block_keys
from kvcache.connectors.paged import PagedCache
from kvcache.connectors.transfer.factory import open_copier
from tests.support.forked_children import methods_usable_in_child, run_in_child
from tests.support.paged_caches import Geometry, l1_stack

G = Geometry(layers=2, blocks=8, tokens=16, heads=2, dim=16)
KEYS = block_keys(range(4 * 16), 16)


def layers() -> list[torch.Tensor]:
    return [torch.randn(2, 8, 16, 2, 16, dtype=torch.bfloat16) for _ in range(2)]


def test_attached_cache_in_a_child_refuses_calls_and_keeps_the_parents_blocks() -> None:
    tensors = layers()
    cache = PagedCache(tensors, "kv-first")
    with l1_stack(cache.block_nbytes, 16) as stack, cache.attach(stack, threads=2) as attached:
        assert attached.save([0, 1, 2, 3], KEYS).stored == 4
        before = [layer[:, :4].clone() for layer in tensors]
        copier = open_copier(cache.placement, stack.front.slab)
        assert methods_usable_in_child(attached, copier) == []
        copier.close()
        assert attached.load(KEYS, [4, 5, 6, 7]) == 4
        assert all(torch.equal(a[:, 4:], b) for a, b in zip(tensors, before, strict=True))


def test_child_with_a_stack_of_its_own_stores_and_loads_blocks() -> None:
    tensors = layers()
    cache = PagedCache(tensors, "kv-first")
    with l1_stack(cache.block_nbytes, 16) as stack, cache.attach(stack) as attached:
        assert attached.save([0, 1], KEYS[:2]).stored == 2

        def child() -> bool:  # a fork copies tensors that are in host memory
            with l1_stack(cache.block_nbytes, 16) as stack, cache.attach(stack) as attached:
                return attached.save([0], KEYS[:1]).held == 1 and attached.load(KEYS[:1], [5]) == 1

        assert run_in_child(child) is True
