"""Paged caches with the layouts of engines, and a model of their meaning without axis names.

Each kind makes the tensors of a cache in plain torch, and views of its K and V in which every
element has its meaning: ``[blocks, tokens, heads, dim]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvcache.sizes import Size
from kvcache.slab import slot_nbytes_for
from kvcache.stack import Stack
from kvcache.tiers.dram import DramTier

Tensor = Any
KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a cache, the dtype of its elements, and the device that holds it."""

    layers: int = 2
    blocks: int = 12
    tokens: int = 16
    heads: int = 3
    dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"


@dataclass(frozen=True)
class Kind:
    """One way to lay a cache out. ``make`` makes all layers, ``view`` shows K and V of one.

    ``view`` returns views, so a write to them changes the cache. Where a layout splits an axis, the
    view splits it too: K of PagedAttention is ``[blocks, tokens, heads, dim / x, x]``.
    """

    layout: str
    make: Callable[[Geometry], list[Any]]
    view: Callable[[Any], KeysAndValues]


def _empty(g: Geometry, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=g.dtype, device=g.device)


def _each(make: Callable[[Geometry], Any]) -> Callable[[Geometry], list[Any]]:
    return lambda g: [make(g) for _ in range(g.layers)]


def _paged_attention(g: Geometry) -> Any:
    x = 16 // g.dtype.itemsize
    keys = _empty(g, g.blocks, g.heads, g.dim // x, g.tokens, x)
    return keys, _empty(g, g.blocks, g.heads, g.dim, g.tokens)


def _interleaved(g: Geometry) -> list[Any]:
    """The layers of a block side by side, as in LMCache and vLLM's BLHNC."""
    whole = _empty(g, g.blocks, g.layers, g.heads, g.tokens, 2 * g.dim)
    return [whole[:, layer] for layer in range(g.layers)]


def _heads_outside(g: Geometry) -> list[Any]:
    """Every head has its own blocks, as in vLLM's LHBNC."""
    whole = _empty(g, g.layers, g.heads, g.blocks, g.tokens, 2 * g.dim)
    return [layer.transpose(0, 1) for layer in whole]


def l1_stack(block_nbytes: int, blocks: int = 16) -> Stack:
    """Open a stack of L1 alone, with room for `blocks` blocks."""
    slot_nbytes = slot_nbytes_for(block_nbytes)
    tier = DramTier(block_nbytes=block_nbytes, capacity=Size(blocks * slot_nbytes))
    tier.slab.wait_populated()
    return Stack(tier, profile="tests")


def _hnd(cache: Tensor) -> KeysAndValues:
    keys, values = cache.transpose(-2, -3).unbind(1)
    return keys, values


def _packed(cache: Tensor) -> KeysAndValues:
    keys, values = cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


KINDS: dict[str, Kind] = {
    "kv-first": Kind(
        "kv-first",
        _each(lambda g: _empty(g, 2, g.blocks, g.tokens, g.heads, g.dim)),
        lambda cache: (cache[0], cache[1]),
    ),
    "kv-first, heads first in memory": Kind(
        "kv-first",
        _each(lambda g: _empty(g, 2, g.blocks, g.heads, g.tokens, g.dim).transpose(2, 3)),
        lambda cache: (cache[0], cache[1]),
    ),
    "kv-first-hnd": Kind(
        "kv-first-hnd",
        _each(lambda g: _empty(g, 2, g.blocks, g.heads, g.tokens, g.dim)),
        lambda cache: (cache[0].transpose(1, 2), cache[1].transpose(1, 2)),
    ),
    "blocks-first": Kind(
        "blocks-first",
        _each(lambda g: _empty(g, g.blocks, 2, g.tokens, g.heads, g.dim)),
        lambda cache: (cache[:, 0], cache[:, 1]),
    ),
    "blocks-first-hnd": Kind(
        "blocks-first-hnd",
        _each(lambda g: _empty(g, g.blocks, 2, g.heads, g.tokens, g.dim)),
        _hnd,
    ),
    "packed": Kind(
        "packed", _each(lambda g: _empty(g, g.blocks, g.heads, g.tokens, 2 * g.dim)), _packed
    ),
    "packed, tokens first in memory": Kind(
        "packed",
        _each(lambda g: _empty(g, g.blocks, g.tokens, g.heads, 2 * g.dim).transpose(1, 2)),
        _packed,
    ),
    "packed, layers interleaved": Kind("packed", _interleaved, _packed),
    "packed, heads outside blocks": Kind("packed", _heads_outside, _packed),
    "pair": Kind(
        "pair",
        _each(lambda g: tuple(_empty(g, g.blocks, g.tokens, g.heads, g.dim) for _ in "kv")),
        lambda pair: (pair[0], pair[1]),
    ),
    "pair-hnd": Kind(
        "pair-hnd",
        _each(lambda g: tuple(_empty(g, g.blocks, g.heads, g.tokens, g.dim) for _ in "kv")),
        lambda pair: (pair[0].transpose(1, 2), pair[1].transpose(1, 2)),
    ),
    "paged-attention": Kind(
        "paged-attention",
        _each(_paged_attention),
        lambda pair: (pair[0].permute(0, 3, 1, 2, 4), pair[1].permute(0, 3, 1, 2)),
    ),
}

# A latent is the key and, except for its last part, also the value. There is one head.
LATENT = {
    "mla": Kind(
        "mla",
        _each(lambda g: _empty(g, g.blocks, g.tokens, g.dim)),
        lambda cache: (cache[:, :, None, :], cache[:, :, None, :-8]),
    ),
    "mla-packed": Kind(
        "mla-packed",
        _each(lambda g: _empty(g, g.blocks, 1, g.tokens, g.dim)),
        lambda cache: (cache.transpose(1, 2), cache.transpose(1, 2)[..., :-8]),
    ),
}


def keys_and_values(kind: Kind, layers: list[Any]) -> list[KeysAndValues]:
    """Return copies of K and V of every layer, ``[blocks, tokens, heads, dim]``."""
    return [
        (keys.flatten(3).clone(), values.flatten(3).clone())
        for keys, values in map(kind.view, layers)
    ]


def tensors(layers: list[Any]) -> list[Tensor]:
    """Return all tensors of a cache, layer by layer."""
    return [
        tensor for layer in layers for tensor in (layer if isinstance(layer, tuple) else (layer,))
    ]


def fill(layers: list[Any], seed: int = 0) -> None:
    """Fill the cache with normally distributed numbers, as if an engine had computed them."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors(layers):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def overwrite(layers: list[Any], seed: int = 1) -> None:
    """Fill the cache with random bytes, some of which are NaNs."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors(layers):
        noise = torch.randint(
            0, 256, (*tensor.shape, tensor.itemsize), generator=generator, dtype=torch.uint8
        )
        tensor.copy_(noise.view(tensor.dtype).squeeze(-1))


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, because NaN does not equal itself."""
    return tensor.flatten().view(torch.uint8)


def same_blocks(
    one: list[KeysAndValues], ids: list[int], other: list[KeysAndValues], others: list[int]
) -> bool:
    """Whether block ``ids[i]`` of one cache has the meaning of block ``others[i]`` of another."""
    return all(
        torch.equal(as_bytes(part[ids]), as_bytes(counterpart[others]))
        for parts, counterparts in zip(one, other, strict=True)
        for part, counterpart in zip(parts, counterparts, strict=True)
    )
