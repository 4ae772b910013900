"""A small paged cache of an engine, registered to be kept in a stack."""

from __future__ import annotations

from kvcache import block_keys
from kvcache.connectors.paged import AttachedCache, PagedCache
from kvcache.connectors.transfer.factory import Order
from kvcache.stack import Stack
from tests.support.paged_caches import (
    KINDS,
    LATENT,
    Geometry,
    KeysAndValues,
    fill,
    keys_and_values,
)

SMALL = Geometry(layers=2, blocks=8, tokens=16, heads=2, dim=16)
SMALL_BLOCK_NBYTES = 2 * 2 * 16 * 2 * 16 * 2


def chain_keys(blocks: int, first: int = 0) -> list[bytes]:
    """Return the keys of a chain of blocks of 16 tokens."""
    return block_keys(range(first, first + 16 * blocks), 16)


class EngineCache:
    """A registered cache of one kind. ``contents`` are copies of its K and V."""

    def __init__(self, name: str, order: Order = "raw", g: Geometry = SMALL, seed: int = 0) -> None:
        self.kind = (KINDS | LATENT)[name]
        self.layers = self.kind.make(g)
        fill(self.layers, seed)
        self.cache = PagedCache(self.layers, self.kind.layout, order=order, tokens=g.tokens)

    @property
    def contents(self) -> list[KeysAndValues]:
        return keys_and_values(self.kind, self.layers)

    def attach(self, stack: Stack, threads: int = 1) -> AttachedCache:
        return self.cache.attach(stack, threads=threads)
