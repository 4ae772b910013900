"""The KV cache of a simulated model, word by word: what a right computation writes, and checks.

All KV cache groups share the memory, as vLLM's do: a block id is one page, whatever its group. A
word of 64 bits names the tokens that it was computed from, its group, layer, place and rank. So
bytes of another block, group, part or rank are seen to be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int64]
Rank = tuple[int, int]  # (pipeline rank, tensor rank)

EMPTY, UNSOUND = 0, 1
"""Prefixes: no token; tokens that vLLM itself computed from wrong blocks."""
_GARBAGE = -1


class WrongKVError(AssertionError):
    """Bytes are not those that they have to be."""


class Prefixes:
    """Numbers of token sequences; a sequence has another number after the weights have changed."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int, int], int] = {}
        self.version = 0

    def extend(self, numbers: list[int], tokens: Sequence[int]) -> None:
        """Append the numbers of the leading parts of ``tokens`` that ``numbers`` lacks."""
        last = numbers[-1] if numbers else EMPTY
        for token in tokens[len(numbers) :]:
            last = self.after(last, token)
            numbers.append(last)

    def after(self, prefix: int, token: int) -> int:
        """Return the number of a sequence that continues another one."""
        step = (prefix, token, self.version if prefix == EMPTY else 0)
        return self._numbers.setdefault(step, len(self._numbers) + UNSOUND + 1)


@dataclass(frozen=True)
class PlayedGroup:
    """A KV cache group of a simulated model.

    Attributes:
        index: among vLLM's groups.
        kind: which blocks a token needs.
        block_tokens: tokens of a block.
        layers: of all pipeline ranks.
        words: of a token in a layer; of a whole state.
        tokens: of the window or the chunk.
        replicas: consecutive tensor ranks that hold the same words.
    """

    index: int
    kind: Literal["all", "window", "chunk", "state"]
    block_tokens: int
    layers: int = 1
    words: int = 1
    tokens: int = 0
    replicas: int = 1

    @property
    def prefixes(self) -> int:
        """Prefixes of which a block has words: one for each token; a state has one."""
        return 1 if self.kind == "state" else self.block_tokens

    @property
    def columns(self) -> int:
        """Words of a block in one layer."""
        return self.words * self.prefixes

    def columns_of(self, at: int) -> slice:
        """Return where a block has the words of a layer: the ``at``-th that a rank has."""
        return slice(at * self.columns, (at + 1) * self.columns)

    def first_token(self, end: int) -> int:
        """Return the first token that the token at ``end`` attends to."""
        match self.kind:
            case "window":
                return max(0, end - self.tokens + 1)
            case "chunk":
                return end // self.tokens * self.tokens
            case _:
                return 0


def layer_name(group: int, number: int) -> str:
    """Return the name of a layer of a group in vLLM's config."""
    return f"layer.{group}.{number}"


class RankMemory:
    """The KV cache of one rank, which has every ``pipeline``-th layer of each group.

    Attributes:
        layers: of each group: the numbers of the layers that this rank has.
        nbytes: of each group: bytes of a block.
    """

    def __init__(
        self, groups: Sequence[PlayedGroup], blocks: int, rank: Rank, pipeline: int
    ) -> None:
        self.rank = rank
        self.layers = [range(rank[0], group.layers, pipeline) for group in groups]
        self._groups = groups
        self._places = [self._places_of(group) for group in groups]
        self.nbytes = [len(self.layers[group.index]) * group.columns * 8 for group in groups]
        self._words = np.full((blocks, max(self.nbytes) // 8), _GARBAGE, dtype=np.int64)

    def _places_of(self, group: PlayedGroup) -> Words:
        """Return what distinguishes the words of tokens with the same prefix."""
        layers = np.array(self.layers[group.index], dtype=np.int64)[:, None, None] << 8
        words = np.arange(group.words, dtype=np.int64)[None, None, :]
        return layers + words + (group.index << 16) + (self.rank[1] // group.replicas << 12)

    def caches(self) -> dict[str, Any]:
        """Return the tensor of each layer, by name: all blocks of one lie side by side."""
        import torch

        words = torch.from_numpy(self._words)
        return {
            layer_name(group.index, number): words[:, group.columns_of(at)]
            for group in self._groups
            for at, number in enumerate(self.layers[group.index])
        }

    def words_of(self, group: PlayedGroup, prefixes: Words) -> Words:
        """Return the words ``[layers, tokens * words]`` of tokens with these prefixes."""
        words: Words = (prefixes[None, :, None] << 24) + self._places[group.index]
        return words.reshape(len(self._places[group.index]), len(prefixes) * group.words)

    def _words_of_layer(self, group: PlayedGroup, at: int, prefixes: Words) -> Words:
        words: Words = (prefixes[:, None] << 24) + self._places[group.index][at]
        return words.ravel()

    def zero(self, block: int) -> None:
        self._words[block] = 0

    def spoil(self, block: int, *, unsound: bool = False) -> None:
        """Make the bytes of a block wrong; `unsound`: vLLM may compute on them."""
        self._words[block] = UNSOUND << 24 if unsound else _GARBAGE

    def copy(self, source: int, target: int) -> None:
        self._words[target] = self._words[source]

    def holds(
        self,
        group: PlayedGroup,
        at: int,
        table: Sequence[int],
        prefixes: Words,
        first: int,
        end: int,
    ) -> bool:
        """Whether the blocks of a table hold the tokens from ``first`` to ``end``.

        Args:
            group: of the table.
            at: the position of a layer among those of the group that this rank has.
            table: blocks.
            prefixes: of all tokens of the request; of a state, its one.
            first: the first token.
            end: the token after the last one.

        Returns:
            false if vLLM itself computed some of them from wrong blocks.

        Raises:
            WrongKVError: if they are wrong for another reason.
        """
        if first >= end:
            return True
        size = group.prefixes
        blocks = table[first // size : -(-end // size)]
        pages = self._words[blocks, group.columns_of(at)].ravel()
        begin = first % size * group.words
        expected = self._words_of_layer(group, at, prefixes[first:end])
        found = pages[begin : begin + len(expected)]
        if found.shape == expected.shape:
            right = found == expected
            if right.all():
                return True
            if (right | (found >> 24 == UNSOUND)).all():
                return False
        raise WrongKVError(
            f"rank {self.rank} computes on wrong blocks {blocks} of {group}, layer {at}, tokens"
            f" {first}-{end}"
        )

    def write(
        self,
        group: PlayedGroup,
        at: int,
        table: Sequence[int],
        prefixes: Words,
        first: int,
        end: int,
    ) -> None:
        """Write the tokens from ``first`` to ``end`` of one layer into the blocks of a table."""
        size, pages = group.prefixes, self._words[:, group.columns_of(at)]
        for column in range(first // size, -(-end // size)):
            begin, last = max(first, column * size), min(end, (column + 1) * size)
            if not table[column]:
                raise WrongKVError(f"rank {self.rank} writes {group} to the null block at {begin}")
            words = self._words_of_layer(group, at, prefixes[begin:last])
            start = (begin - column * size) * group.words
            pages[table[column], start : start + len(words)] = words
