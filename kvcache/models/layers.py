"""What the layers of a model keep, and the kept groups that they make up.

Invariants: bytes of a block are those of all layers of a group on all tensor-parallel ranks,
without padding. Bytes that several ranks hold alike count once, as L1 keeps them once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.resume import Needs


@dataclass(frozen=True, slots=True)
class AttentionLayers:
    """Layers of a model that keep a key and a value of every token.

    `head_elements` is the number of elements of a key and its value together. `kv_heads` 1 with
    `shared` means one latent or one index key for all ranks (MLA). `element_nbytes` is fixed by the
    model; None means the data type of the KV cache.
    """

    layers: int
    kv_heads: int
    head_elements: int
    needs: Needs
    shared: bool = False
    element_nbytes: int | None = None

    def rank_token_nbytes(self, ranks: int, cache_nbytes: int) -> int:
        """Return the bytes of a token in one layer on one rank."""
        heads = 1 if self.shared else max(1, self.kv_heads // ranks)
        return heads * self.head_elements * (self.element_nbytes or cache_nbytes)

    def copies(self, ranks: int) -> int:
        """Return how many ranks hold the same bytes."""
        return ranks if self.shared else max(1, ranks // self.kv_heads)


@dataclass(frozen=True, slots=True)
class StateLayers:
    """Layers that keep a state after a block: a convolution's last inputs, and a recurrent state.

    Mamba 2 has `groups` of `group_channels` channels in its convolution; vLLM adds groups until the
    ranks can divide them. `recurrent_nbytes` is the bytes of an element of the recurrent state;
    None means those of the convolution's, which has the model's data type.
    """

    layers: int
    channels: int
    inputs: int
    recurrent_elements: int = 0
    recurrent_nbytes: int | None = None
    groups: int = 1
    group_channels: int = 0

    def rank_nbytes(self, ranks: int, model_nbytes: int) -> int:
        """Return the bytes of the state of one layer on one rank.

        Raises:
            ValueError: `ranks` cannot divide the channels or the recurrent state.
        """
        more = 0 if self.groups % ranks == 0 else ranks - self.groups
        channels = self.channels + more * self.group_channels
        if more < 0 or channels % ranks or self.recurrent_elements % ranks:
            raise ValueError(f"{ranks} ranks cannot divide the state of a layer")
        convolution = channels // ranks * self.inputs * model_nbytes
        return convolution + self.recurrent_elements // ranks * (
            self.recurrent_nbytes or model_nbytes
        )


Layers = AttentionLayers | StateLayers


@dataclass(frozen=True, slots=True)
class ModelGroup:
    """The layers of a model that need the same blocks at the same time.

    A block has `block_tokens` tokens; a block of states is the state after its last token.
    """

    needs: Needs
    layers: int
    block_tokens: int
    block_nbytes: int
    rank_block_nbytes: int

    def needed_blocks(self, end: int) -> int:
        """Return how many blocks a request needs to resume after `end` tokens."""
        return -(-end // self.block_tokens) - self.needs.first_token(end) // self.block_tokens


def groups_of(
    kinds: Sequence[Layers],
    *,
    ranks: int = 1,
    block_tokens: int = 16,
    cache_nbytes: int = 2,
    model_nbytes: int = 2,
) -> tuple[ModelGroup, ...]:
    """Return the groups of a model's layers, those that need all tokens first.

    Args:
        kinds: Layers of the model, one entry for each kind.
        ranks: Tensor-parallel ranks.
        block_tokens: The engine's block size, which vLLM raises for layers with smaller pages.
        cache_nbytes: Bytes of an element of the KV cache.
        model_nbytes: Bytes of an element of the model's data type.

    Raises:
        ValueError: `ranks` cannot divide the model.
    """
    states = [kind for kind in kinds if isinstance(kind, StateLayers)]
    attention = [kind for kind in kinds if isinstance(kind, AttentionLayers)]
    tokens = _block_tokens(attention, states, ranks, block_tokens, cache_nbytes, model_nbytes)
    groups: dict[tuple[Needs, int], ModelGroup] = {}

    def add(needs: Needs, layers: int, size: int, nbytes: int, copies: int) -> None:
        found = groups.get((needs, size), ModelGroup(needs, 0, size, 0, 0))
        groups[needs, size] = ModelGroup(
            needs,
            found.layers + layers,
            size,
            found.block_nbytes + layers * nbytes * ranks // copies,
            found.rank_block_nbytes + layers * nbytes,
        )

    one_number = len({kind.kv_heads for kind in attention if not kind.shared}) == 1
    for layer, size in zip(attention, tokens, strict=True):
        nbytes = size * layer.rank_token_nbytes(ranks, cache_nbytes)
        # The connector finds shared heads only in models with one number of KV heads.
        copies = layer.copies(ranks) if layer.shared or one_number else 1
        add(layer.needs, layer.layers, size, nbytes, copies)
    for state in states:
        size = tokens[0] if tokens else block_tokens
        add(Needs("state"), state.layers, size, state.rank_nbytes(ranks, model_nbytes), 1)
    return tuple(sorted(groups.values(), key=lambda group: group.needs.kind != "all"))


def alignment(groups: Sequence[ModelGroup]) -> int:
    """Return the tokens that a hit is a multiple of."""
    return math.lcm(*(group.block_tokens for group in groups))


def _block_tokens(
    attention: Sequence[AttentionLayers],
    states: Sequence[StateLayers],
    ranks: int,
    block_tokens: int,
    cache_nbytes: int,
    model_nbytes: int,
) -> list[int]:
    """Return the tokens of a block of each kind of attention layers.

    vLLM gives all layers pages of one size. Next to states, it raises the block size until a page
    of attention has room for a state. Among several kinds of attention, those with smaller pages
    get more tokens in a block if the largest page is a multiple of theirs, and padding if not.
    """
    if not attention:
        return []
    token_nbytes = [kind.rank_token_nbytes(ranks, cache_nbytes) for kind in attention]
    if states:
        state = max(kind.rank_nbytes(ranks, model_nbytes) for kind in states)
        blocks = -(-state // (block_tokens * max(token_nbytes)))
        return [block_tokens * max(1, blocks)] * len(attention)
    if len({kind.needs for kind in attention}) == 1:
        return [block_tokens] * len(attention)
    page = max(token_nbytes)
    return [block_tokens * (page // nbytes if page % nbytes == 0 else 1) for nbytes in token_nbytes]
