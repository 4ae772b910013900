"""vLLM's handshake at start: from the shards that the workers describe to one open stack."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvcache.connectors.vllm.compat import host_name, replica_of
from kvcache.connectors.vllm.messages import Rank, Shard, SlabShards
from kvcache.keys import namespace
from kvcache.slab import Slab
from kvcache.stack import Stack

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

log = logging.getLogger(__name__)


def shard_offsets(shards: Mapping[Rank, Shard], ranks: int) -> dict[Rank, int]:
    """Return the offset of each rank's shard within a slot, in bytes.

    Raises:
        RuntimeError: if one of ``ranks`` is missing, or is on another host.
    """
    if len(shards) != ranks:
        raise RuntimeError(f"kvcache: {len(shards)} of {ranks} workers described their blocks")
    offsets, end = dict[Rank, int](), 0
    for rank, shard in sorted(shards.items()):
        if shard.host != host_name():
            raise RuntimeError(
                f"kvcache: the worker of pipeline rank {rank[0]}, tensor rank {rank[1]} is on "
                f"another host ({shard.host}) than the scheduler ({host_name()}); L1 is memory "
                "that one host shares, so all ranks of an engine must be on it"
            )
        offsets[rank] = end
        end += shard.nbytes
    return offsets


def open_sharded_stack(
    open_stack: Callable[..., Stack],
    shards: Mapping[Rank, Shard],
    parallel: ParallelConfig,
    *,
    identity: Mapping[str, object],
    model: str,
    block_tokens: int,
) -> tuple[Stack, SlabShards]:
    """Open a stack of blocks that have one shard for each rank.

    Args:
        open_stack: opens it, as `kvcache.profiles.open_stack` does.
        shards: by rank.
        parallel: vLLM's parallel config.
        identity: fields of the namespace, apart from the formats of the shards.
        model: its served name, which `kvcache inspect` shows.
        block_tokens: tokens of a block.

    Raises:
        RuntimeError: if a rank is missing, or is on another host.
        ProfileError: if the profile is wrong.
    """
    offsets = shard_offsets(shards, parallel.world_size)
    block_nbytes = sum(shard.nbytes for shard in shards.values())
    formats = {f"rank {rank}": shard.format_id for rank, shard in shards.items()}
    stack = open_stack(
        block_nbytes=block_nbytes,
        namespace=namespace({**identity, **formats}),
        identity={"model": model, **identity, **formats},
        element_nbytes=max(shard.element_nbytes for shard in shards.values()),
        block_tokens=block_tokens,
        ranks=len(shards),
        replica=replica_of(parallel),
    )
    slab = stack.front.slab.descriptor
    Slab.attach(slab).close()  # raises now, at start, what every worker would raise later
    log.info(
        "kvcache: connector: profile %s, L1 of %.1f GiB: %d blocks of %d tokens, %d bytes each",
        stack.profile,
        slab.slots * slab.slot_nbytes / 2**30,
        slab.slots,
        block_tokens,
        block_nbytes,
    )
    return stack, SlabShards(slab, offsets)
