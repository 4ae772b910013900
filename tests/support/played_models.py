"""Simulated models with one or several KV cache groups, and their cache specs in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

pytest.importorskip("vllm")

from tests.support.played_memory import PlayedGroup

BLOCK: Final = 16  # tokens
LONGEST: Final = 224  # tokens of a request


@dataclass(frozen=True)
class PlayedModel:
    """A model and how it is spread.

    Attributes:
        groups: vLLM's KV cache groups.
        mla: whether full attention is MLA; all tensor ranks hold its KV.
        drafts: drafted tokens of each step.
        eagle: whether the last group is the drafter's, and vLLM drops the last block of its hits.
        tensor, pipeline: ranks.
        match_unit: vLLM's ``--prefix-match-unit``: vLLM's own cache then finds parts of blocks.
    """

    groups: tuple[PlayedGroup, ...]
    mla: bool = False
    drafts: int = 0
    eagle: bool = False
    tensor: int = 1
    pipeline: int = 1
    match_unit: int | None = None

    @property
    def block_tokens(self) -> int:
        """Tokens of vLLM's ``--block-size``; it is at least that of states."""
        states = [group.block_tokens for group in self.groups if group.kind == "state"]
        return max([self.groups[0].block_tokens, *states])

    @property
    def finds_parts(self) -> bool:
        """Whether vLLM's own cache finds parts of blocks."""
        sizes = {group.block_tokens for group in self.groups}
        has_states = any(group.kind == "state" for group in self.groups)
        return has_states and (len(sizes) > 1 or self.match_unit is not None)

    def specs(self) -> list[Any]:
        """Return vLLM's cache spec of each group."""
        return [self._spec(group) for group in self.groups]

    def _spec(self, group: PlayedGroup) -> Any:
        import torch
        from vllm.v1 import kv_cache_interface as vllm_specs

        size = {"block_size": group.block_tokens}
        if group.kind == "state":
            shapes, dtypes = ((group.words,),), (torch.int64,)
            return vllm_specs.MambaSpec(
                **size, shapes=shapes, dtypes=dtypes, mamba_cache_mode="align",
                num_speculative_blocks=self.drafts,
            )  # fmt: skip
        heads: dict[str, Any] = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
        if group.kind == "window":
            return vllm_specs.SlidingWindowSpec(**size, **heads, sliding_window=group.tokens)
        if group.kind == "chunk":
            return vllm_specs.ChunkedLocalAttentionSpec(
                **size, **heads, attention_chunk_size=group.tokens
            )
        if self.mla:
            fields = vllm_specs.MLAAttentionSpec.__dataclass_fields__
            shards = {"max_tp_shards": 1} if "max_tp_shards" in fields else {}  # from vLLM 0.31 on
            return vllm_specs.MLAAttentionSpec(**size, **heads, **shards)
        return vllm_specs.FullAttentionSpec(**size, **heads)


def model(*groups: PlayedGroup, **options: Any) -> PlayedModel:
    """Return a model with these groups, in this order."""
    return PlayedModel(tuple(replace(g, index=at) for at, g in enumerate(groups)), **options)


def _full(**options: Any) -> PlayedGroup:
    return PlayedGroup(0, "all", **{"block_tokens": BLOCK} | options)


def _window(tokens: int = 40, **options: Any) -> PlayedGroup:
    return PlayedGroup(0, "window", **{"block_tokens": BLOCK, "tokens": tokens} | options)


def _chunk() -> PlayedGroup:
    return PlayedGroup(0, "chunk", BLOCK, tokens=3 * BLOCK)


def _state(words: int = 11, blocks: int = 1) -> PlayedGroup:
    return PlayedGroup(0, "state", blocks * BLOCK, words=words)


MODELS: Final = {
    "full": model(_full(layers=2)),
    "mla": model(_full(replicas=2), mla=True, tensor=2),
    "window": model(_window()),
    "state": model(_state()),
    "full+window": model(_window(layers=2), _full(layers=2)),
    "full+5 windows": model(*[_window(35) for _ in range(5)], _full()),
    "full+3 chunks": model(*[_chunk() for _ in range(3)], _full()),
    "full+3 states": model(*[_state() for _ in range(3)], _full()),
    "mla+window": model(_full(replicas=2), _window(), mla=True, tensor=2),
    "two block sizes": model(_full(words=2), _window(50, block_tokens=2 * BLOCK)),
    "full+window+state": model(_full(), _window(), _state(5)),
    "partial blocks": model(
        _full(block_tokens=2 * BLOCK), _state(blocks=2), _state(blocks=2), match_unit=BLOCK
    ),
    "two windows": model(_full(), _window(20), _window(70)),
    "states in shorter blocks": model(_state(), _full(block_tokens=3 * BLOCK)),
    "short windows": model(_full(), _window(1), _window(5), _window(BLOCK + 1)),
    "full with drafts": model(_full(layers=2), drafts=2),
    "drafts": model(_full(), _window(), drafts=2),
    "drafts+states": model(_full(), _state(), _state(), drafts=2),
    "drafter layers": model(_full(), _window(), _window(33), drafts=2, eagle=True),
    "drafter layers+states": model(_full(), _state(), _window(33), drafts=2, eagle=True),
    "drafts on two stages": model(_full(layers=2), _window(layers=2), drafts=2, pipeline=2),
    "pipeline": model(_full(layers=3), _window(layers=1), pipeline=2),
    "pipeline+states": model(_full(layers=2), _state(), _state(), pipeline=2),
    "two ranks": model(_full(), _window(), tensor=2),
    "states on two ranks": model(_full(), _state(), tensor=2),
}
