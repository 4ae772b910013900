"""The KV cache groups of vLLM: which are supported, and how the blocks of one are addressed.

vLLM puts layers into a group if their blocks are alike. It passes block ids as one sequence for
each group, and chains its block hashes at a size that divides the block size of every group.

One group of full attention is supported. All code that depends on that is in this module: another
kind of group is accepted in `groups_refusal`, and described by a `CacheGroup` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


@dataclass(frozen=True, slots=True)
class KeptGroup:
    """A group of blocks that kvcache keeps: those of vLLM's groups that need the same blocks.

    Attributes:
        index: its number among the kept groups; chain groups come first.
        members: numbers of vLLM's groups.
        block_tokens: tokens of a block.
        hashes_per_block: block hashes of vLLM that one block spans.
    """

    index: int
    members: tuple[int, ...]
    block_tokens: int
    hashes_per_block: int

    def hashes(self, block_hashes: list[bytes], first: int, end: int) -> list[bytes]:
        """Return the hashes of blocks ``first`` to ``end``: the last hash that each block spans."""
        per = self.hashes_per_block
        return block_hashes[first * per + per - 1 : end * per : per]


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """A KV cache group with blocks that kvcache keeps.

    Attributes:
        index: its place among vLLM's groups, and in every sequence by group.
        layer_names: of the layers that a block has a page of, in order.
        spec: vLLM's cache spec. In a worker it may be a wrapper with one spec for each layer.
        block_tokens: tokens of a block.
        hashes_per_block: block hashes of vLLM that one block spans.
    """

    index: int
    layer_names: Sequence[str]
    spec: Any
    block_tokens: int
    hashes_per_block: int

    def block_ids(self, by_group: Sequence[Sequence[int]]) -> Sequence[int]:
        """Return the block ids of this group."""
        return by_group[self.index]

    def complete_blocks(self, tokens: int, hashes: int) -> int:
        """Return how many blocks ``tokens`` tokens complete; at most those in ``hashes``."""
        by_tokens, by_hashes = tokens // self.block_tokens, hashes // self.hashes_per_block
        return min(by_hashes, by_tokens)  # faster than min()

    def hashes(self, block_hashes: list[bytes], first: int, end: int) -> list[bytes]:
        """Return the hashes of blocks ``first`` to ``end``: the last hash that each block spans."""
        per = self.hashes_per_block
        return block_hashes[first * per + per - 1 : end * per : per]


NO_GROUP: Final = CacheGroup(0, (), None, block_tokens=0, hashes_per_block=1)
"""Stands in for the group of an engine that is refused."""


def kept_group(kv_cache_config: KVCacheConfig) -> CacheGroup:
    """Return the group of a config that `groups_refusal` does not refuse."""
    [group] = kv_cache_config.kv_cache_groups
    block_tokens = group.kv_cache_spec.block_size
    hash_tokens = getattr(kv_cache_config, "hash_block_size", None) or block_tokens
    return CacheGroup(
        0, group.layer_names, group.kv_cache_spec, block_tokens, block_tokens // hash_tokens
    )


def kept_groups(kv_cache_config: KVCacheConfig) -> tuple[KeptGroup, ...]:
    """Return the kept groups of a config that `groups_refusal` does not refuse."""
    members: dict[tuple[Any, ...], list[int]] = {}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        window = getattr(spec, "sliding_window", None)
        members.setdefault((spec.block_size, type(spec), window), []).append(number)
    return tuple(
        KeptGroup(index, tuple(numbers), block_tokens, 1)
        for index, ((block_tokens, *_), numbers) in enumerate(members.items())
    )


def may_load_within_step(groups: Sequence[KeptGroup]) -> bool:
    """Return whether the forward pass of a step may wait for the loads of these groups."""
    return len(groups) == 1 and len(groups[0].members) == 1


def groups_refusal(kv_cache_config: KVCacheConfig) -> str | None:
    """Return why the blocks of these groups cannot be kept; ``None`` if they can."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups, and blocks of one can be kept"
    [group] = groups
    if not getattr(group, "enable_kv_transfer", True):
        return "vLLM rebuilds its KV cache group from others, and it must not be loaded"
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        specs = list(spec.kv_cache_specs.values())
    else:
        specs = [spec]
    return next((reason for each in specs if (reason := _spec_refusal(each))), None)


def specs_of(spec: KVCacheSpec) -> Sequence[KVCacheSpec]:
    """Return the spec of each layer of a group: in a worker, a wrapper may hold several."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]


def _spec_refusal(spec: KVCacheSpec) -> str | None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    # Exact types: a subclass exists because its blocks are not those of full attention. RSWASpec
    # drops blocks of generated tokens, SinkFullAttentionSpec attends to sinks outside of the
    # request's blocks, HiddenStateCacheSpec holds no keys and values.
    allowed = (FullAttentionSpec, MLAAttentionSpec)
    if type(spec) not in allowed:
        names = " and ".join(kind.__name__ for kind in allowed)
        return f"its cache is {type(spec).__name__}, and only {names} can be kept"
    if getattr(spec, "non_causal", False):
        return "its attention is not causal: a block's KV depends on the tokens after it"
    return None
