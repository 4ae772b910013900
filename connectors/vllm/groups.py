"""The KV cache groups of vLLM: which are supported, and which of their blocks kvcache keeps.

vLLM puts layers into a group if their blocks are alike. It passes block ids as one sequence for
each group, and chains its block hashes at a size that divides the block size of every group.

A *kept group* consists of those of vLLM's groups that need the same blocks to resume a request:
their rule (`Needs`) and their block size are equal. A block of a kept group is the pages of all its
layers, so vLLM has one block id for it in each member group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd, lcm
from typing import TYPE_CHECKING

from kvcache.connectors.vllm.compat import hooks_refusal
from kvcache.resume import Needs

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


@dataclass(frozen=True)
class KeptGroup:
    """Groups of vLLM with blocks that are found, loaded and stored together.

    Attributes:
        index: its place among the kept groups; chain groups come first.
        members: the numbers of vLLM's groups.
        needs: which blocks a request needs to resume.
        block_tokens: tokens of a block.
        hashes_per_block: block hashes of vLLM that one block spans.
        align_tokens: a request resumes at multiples of these; the same in all kept groups.
    """

    index: int
    members: tuple[int, ...]
    needs: Needs
    block_tokens: int
    hashes_per_block: int
    align_tokens: int = field(default=0, compare=False)

    @cached_property
    def is_chain(self) -> bool:
        """Whether a request needs all blocks from its first token on."""
        return self.needs.kind == "all"

    @cached_property
    def is_state(self) -> bool:
        """Whether a block is the state after its last token, which later tokens overwrite."""
        return self.needs.kind == "state"

    def complete_blocks(self, tokens: int, hashes: int) -> int:
        """Return how many blocks ``tokens`` tokens complete; at most those in ``hashes``."""
        by_tokens, by_hashes = tokens // self.block_tokens, hashes // self.hashes_per_block
        return min(by_tokens, by_hashes)

    def hashes(self, block_hashes: list[bytes], first: int, end: int) -> list[bytes]:
        """Return the hashes of blocks ``first`` to ``end``: the last hash that each block spans."""
        per = self.hashes_per_block
        return block_hashes[first * per + per - 1 : end * per : per]

    def is_reachable(self, block: int) -> bool:
        """Whether a request can resume at a place where it needs this block."""
        end, step = (block + 1) * self.block_tokens, self.align_tokens
        return self.needs.first_token(-(-end // step) * step) < end  # the first such place


def kept_groups(
    kv_cache_config: KVCacheConfig, hash_tokens: int | None = None
) -> tuple[KeptGroup, ...]:
    """Return the kept groups of a config that `groups_refusal` does not refuse.

    Args:
        kv_cache_config: vLLM's.
        hash_tokens: tokens that each block hash adds to the one before it; a worker, which uses no
            hashes, may leave it out.
    """
    members: dict[tuple[Needs, int], list[int]] = {}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        members.setdefault((_needs(spec), spec.block_size), []).append(number)
    sizes = [block_tokens for _, block_tokens in members]
    hash_tokens = hash_tokens or gcd(*sizes)
    ordered = sorted(members.items(), key=lambda item: item[0][0].kind != "all")
    return tuple(
        KeptGroup(
            index, tuple(numbers), needs, block_tokens, block_tokens // hash_tokens, lcm(*sizes)
        )
        for index, ((needs, block_tokens), numbers) in enumerate(ordered)
    )


def groups_refusal(kv_cache_config: KVCacheConfig) -> str | None:
    """Return why the blocks of these groups cannot be kept; ``None`` if they can."""
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        return "the model has no KV cache"
    if not all(getattr(group, "enable_kv_transfer", True) for group in groups):
        return "vLLM rebuilds one of its KV cache groups from others, and it must not be loaded"
    for group in groups:
        specs = specs_of(group.kv_cache_spec)
        if reason := next((reason for spec in specs if (reason := _spec_refusal(spec))), None):
            return reason
        if len({_needs(spec) for spec in specs}) > 1:
            return "layers of one KV cache group need different blocks to resume a request"
    kept = kept_groups(kv_cache_config)
    if may_load_within_step(kept):
        return None
    names = {
        type(spec).__name__: None for group in groups for spec in specs_of(group.kv_cache_spec)
    }
    return hooks_refusal(list(names), states=any(group.is_state for group in kept))


def specs_of(spec: KVCacheSpec) -> Sequence[KVCacheSpec]:
    """Return the spec of each layer of a group: in a worker, a wrapper may hold several."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]


def _needs(spec: KVCacheSpec) -> Needs:
    """Return the rule of a group; its layers have equal rules."""
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    spec = specs_of(spec)[0]
    if type(spec) is SlidingWindowSpec:
        return Needs("window", spec.sliding_window + getattr(spec, "extra_retained_tokens", 0))
    if type(spec) is ChunkedLocalAttentionSpec:
        return Needs("chunk", spec.attention_chunk_size)
    if type(spec) is MambaSpec:
        return Needs("state")
    return Needs("all")


def _spec_refusal(spec: KVCacheSpec) -> str | None:
    """Return why blocks of a layer with this spec cannot be kept; ``None`` if they can."""
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    # Exact types: a subclass exists because its blocks are not those of its base. RSWASpec drops
    # blocks of generated tokens, SinkFullAttentionSpec attends to sinks outside of the request's
    # blocks, HiddenStateCacheSpec holds no keys and values, SlidingWindowMLASpec may be replayed.
    allowed: Iterable[type] = (
        FullAttentionSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
        ChunkedLocalAttentionSpec,
        MambaSpec,
    )
    if type(spec) not in allowed:
        names = ", ".join(kind.__name__ for kind in allowed)
        return f"its cache is {type(spec).__name__}, and only {names} can be kept"
    if getattr(spec, "non_causal", False):
        return "its attention is not causal: a block's KV depends on the tokens after it"
    mode = getattr(spec, "mamba_cache_mode", "align")
    if mode != "align":
        return (
            f"its mamba_cache_mode is {mode!r}, and only states of mode 'align' can be kept, which "
            "--enable-prefix-caching selects"
        )
    return None


def may_load_within_step(groups: Sequence[KeptGroup]) -> bool:
    """Whether a load may end within the step that needs it, and fail by its block ids.

    With several groups vLLM's core stops at failed block ids, and a state that is loaded within the
    step is copied before it is there. All other loads are async.
    """
    return len(groups) == 1 and groups[0].is_chain and len(groups[0].members) == 1
