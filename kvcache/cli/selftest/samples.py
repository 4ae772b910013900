"""Sample caches: the paged tensors of a small model, in any layout.

The axes come from `kvcache.connectors.layout.LAYOUTS`, so a layout that is added there is tested
without a change here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Tensor = Any
Layer = Any
"""The tensor of a layer, or its tensors of K and of V."""

LAYERS = 2
SIZES = {"kv": 2, "one": 1, "tokens": 256, "heads": 2, "dim": 128, "latent": 576}
"""The sizes of the axes. flash-attn reads pages of a multiple of 256 tokens only."""

MLA_VALUE_DIM = 512  # of a latent vector of 576 numbers, the part that is also the value

BLOCKS_OUTERMOST = "packed-blocks-outermost"
"""The cache that vLLM allocates for `BLNHC`: all layers of a block lie together."""

_OPAQUE_AXES = "blocks kv tokens heads dim"  # what lies in the pages that are copied unread
_ACCESS_NBYTES = 16  # of the inner part of an axis that is split in two, as in PagedAttention


def sample_names() -> dict[str, str]:
    """Return the layout of every sample, by the name of the sample."""
    from kvcache.connectors.layout import LAYOUTS

    return {**{name: name for name in LAYOUTS}, BLOCKS_OUTERMOST: "packed"}


@dataclass(frozen=True)
class Sample:
    """A cache of `blocks` blocks in bf16.

    Attributes:
        name: of the sample.
        layout: the name of its layout.
        axes: the names of the axes of each tensor of a layer, as in a `Layout`.
        layers: the tensor or tensors of each layer.
    """

    name: str
    layout: str
    axes: tuple[str, ...]
    layers: list[Layer]

    def tensors(self) -> Iterator[tuple[Tensor, int]]:
        """Yield every tensor, and the number of its axis of blocks."""
        for layer in self.layers:
            for tensor, words in zip(tensors_of(layer), self.axes, strict=True):
                yield tensor, words.split().index("blocks")

    def fill(self, seed: int) -> None:
        """Fill the cache with random numbers from 1/8 to 2, half of them negative.

        The sign, two bits of the exponent and the fraction are random bits, which takes a tenth of
        the time of normally distributed numbers.
        """
        import torch

        for number, (tensor, _) in enumerate(self.tensors()):
            generator = torch.Generator(tensor.device).manual_seed(1000 * seed + number)
            # Each random number of 64 bits fills four numbers of the cache.
            tensor.view(torch.int64).random_(-(1 << 63), None, generator=generator)
            bits = tensor.view(torch.int16)
            bits.bitwise_and_(0x81FF - 0x10000).bitwise_or_(0x3E00)

    def wipe(self) -> None:
        """Overwrite the cache with NaN."""
        for tensor, _ in self.tensors():
            tensor.fill_(math.nan)

    def pages(self, blocks: Sequence[int]) -> list[Tensor]:
        """Return a copy of the pages of `blocks` in every tensor."""
        import torch

        return [
            tensor.index_select(axis, torch.tensor(blocks, device=tensor.device))
            for tensor, axis in self.tensors()
        ]

    def keys_and_values(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return views of K and V of a layer, `[blocks, tokens, heads, dim]`.

        If the layout splits the last axis, so do the views: `[blocks, tokens, heads, dim, dim]`.
        """
        parts: list[Tensor] = []
        for tensor, words in zip(tensors_of(layer), self.axes, strict=True):
            parts += _named_parts(tensor, words.split())
        if len(parts) == 1:  # a latent vector is the key and, but for its last part, the value
            return parts[0], parts[0][..., :MLA_VALUE_DIM]
        keys, values = parts
        return keys, values


def open_sample(name: str, blocks: int, device: str) -> Sample:
    """Allocate the sample with this name of :func:`sample_names`."""
    import torch

    from kvcache.connectors.layout import LAYOUTS

    layout = sample_names()[name]
    axes = (_OPAQUE_AXES,) if layout == "opaque" else LAYOUTS[layout].tensors
    sizes, dtype = SIZES | {"blocks": blocks}, torch.bfloat16
    if name == BLOCKS_OUTERMOST:
        inner = (sizes["tokens"], sizes["heads"], sizes["kv"] * sizes["dim"])
        whole = torch.empty((blocks, LAYERS, *inner), dtype=dtype, device=device)
        return Sample(name, layout, axes, [whole[:, at].transpose(1, 2) for at in range(LAYERS)])
    shapes = [_shape(words.split(), sizes, _ACCESS_NBYTES // dtype.itemsize) for words in axes]
    layers = []
    for _ in range(LAYERS):
        tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        layers.append(tensors if len(tensors) > 1 else tensors[0])
    return Sample(name, layout, axes, layers)


def tensors_of(layer: Layer) -> tuple[Tensor, ...]:
    """Return the tensors of a layer as a tuple."""
    return layer if isinstance(layer, tuple) else (layer,)


def _shape(words: list[str], sizes: dict[str, int], inner: int) -> list[int]:
    """Return the size of each axis; of a name that occurs twice, the second has `inner` steps."""
    shape, seen = [], set()
    for word in words:
        size = 1
        for name in word.split("."):
            step = sizes[name]
            if words.count(name) > 1:
                step = inner if name in seen else step // inner
            seen.add(name)
            size *= step
        shape.append(size)
    return shape


def _named_parts(tensor: Tensor, words: list[str]) -> list[Tensor]:
    """Return K and V of a tensor that holds both, or the one part that it holds."""
    names: list[str] = []
    for word in words:
        outer, _, inner = word.rpartition(".")
        if outer:
            tensor = tensor.unflatten(len(names), (SIZES[outer], -1))
            names.append(outer)
        names.append({"one": "heads", "latent": "dim"}.get(inner, inner))
    if "heads" not in names:
        tensor = tensor.unsqueeze(-2)
        names.insert(-1, "heads")
    parts = [tensor]
    if "kv" in names:
        parts = list(tensor.unbind(names.index("kv")))
        names.remove("kv")
    dims = [at for at, name in enumerate(names) if name == "dim"]
    order = [*map(names.index, ("blocks", "tokens", "heads")), *dims]
    return [part.permute(order) for part in parts]
