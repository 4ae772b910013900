"""vLLM's handshake at start: from the shards that the workers describe to one open stack."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvcache.connectors.vllm.compat import host_name, replica_of
from kvcache.connectors.vllm.groups import KeptGroup
from kvcache.connectors.vllm.messages import Rank, Refusal, Shard, SlabShards
from kvcache.connectors.vllm.scheduler.announcement import announce, wait_attached
from kvcache.connectors.vllm.scheduler.pieces import BlockCut, cut_blocks
from kvcache.keys import namespace
from kvcache.slab import Slab
from kvcache.stack import Stack

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

log = logging.getLogger(__name__)


class FirstHandshake:
    """The handshake that opened the stack. vLLM 0.33 repeats it whenever the engine wakes up."""

    def __init__(self) -> None:
        self._handshakes: dict[Rank, Shard | Refusal] = {}

    def is_repeated_by(self, handshakes: Mapping[Rank, Shard | Refusal]) -> bool:
        """Whether there was a handshake before this one.

        Raises:
            RuntimeError: if the two differ.
        """
        if not self._handshakes:
            self._handshakes = dict(handshakes)
            return False
        if handshakes != self._handshakes:
            raise RuntimeError(
                "kvcache: after a sleep the workers describe other blocks than at the start"
            )
        return True


def check_ranks(shards: Mapping[Rank, Shard], ranks: int) -> None:
    """Raise RuntimeError if one of ``ranks`` is missing, or is on another host."""
    if len(shards) != ranks:
        raise RuntimeError(f"kvcache: {len(shards)} of {ranks} workers described their blocks")
    for rank, shard in sorted(shards.items()):
        if shard.host != host_name():
            raise RuntimeError(
                f"kvcache: the worker of pipeline rank {rank[0]}, tensor rank {rank[1]} is on "
                f"another host ({shard.host}) than the scheduler ({host_name()}); L1 is memory "
                "that one host shares, so all ranks of an engine must be on it"
            )


def open_sharded_stack(
    open_stack: Callable[..., Stack],
    shards: Mapping[Rank, Shard],
    parallel: ParallelConfig,
    groups: Sequence[KeptGroup],
    *,
    identity: Mapping[str, object],
    model: str,
) -> tuple[Stack, SlabShards, tuple[int, ...]]:
    """Open a stack with a block for each part of the blocks of ``groups``.

    Args:
        open_stack: opens it, as `kvcache.profiles.open_stack` does.
        shards: by rank.
        parallel: vLLM's parallel config.
        groups: the kept groups.
        identity: fields of the namespace, apart from the formats and parts of blocks.
        model: its served name, which `kvcache inspect` shows.

    Returns:
        the stack, its slab with the pieces in it, and the parts of a block of each group.

    Raises:
        RuntimeError: if a rank is missing, or is on another host.
        ProfileError: if the profile is wrong.
    """
    check_ranks(shards, parallel.world_size)
    cut = cut_blocks(shards, groups)
    fields: dict[str, object] = dict(identity)
    fields |= {f"rank {rank}": shard.format_id for rank, shard in shards.items()}
    if len(groups) > 1:
        fields["parts"] = [
            f"vLLM groups {', '.join(map(str, group.members))} in {parts} parts"
            for group, parts in zip(groups, cut.parts, strict=True)
        ]
    if any(not where.stores for piece in cut.pieces for where in piece.ranks.values()):
        fields["replicas"] = {f"rank {rank}": [*each.replicas] for rank, each in shards.items()}
    stack = open_stack(
        block_nbytes=cut.slot_nbytes,
        namespace=namespace(fields),
        identity={"model": model, **fields},
        element_nbytes=max(shard.element_nbytes for shard in shards.values()),
        block_tokens=groups[0].block_tokens,
        ranks=len(shards),
        nodes=sorted({node for shard in shards.values() for node in shard.nodes}),
        replica=replica_of(parallel),
    )
    slab = stack.front.slab.descriptor
    Slab.attach(slab).close()  # raises now, at start, what every worker would raise later
    _log_capacity(stack, groups, cut)
    announce(slab, shards, wait=stack.front.wait_pinned)
    if stack.front.wait_pinned:
        wait_attached(slab, shards)
        stack.front.slab.wait_populated()
    return stack, SlabShards(slab, cut.pieces), cut.parts


def _log_capacity(stack: Stack, groups: Sequence[KeptGroup], cut: BlockCut) -> None:
    """Log how many blocks L1 holds, and which groups of layers they are of."""
    slab = stack.front.slab.descriptor
    gib = slab.slots * slab.slot_nbytes / 2**30
    if cut.parts == (1,):
        log.info(
            "kvcache: connector: profile %s, L1 of %.1f GiB: %d blocks of %d tokens, %d bytes each",
            stack.profile, gib, slab.slots, groups[0].block_tokens, cut.slot_nbytes,
        )  # fmt: skip
        return
    kinds = [
        f"{group.needs.label}: {nbytes} bytes for {group.block_tokens} tokens in {parts} "
        f"slot{'s' if parts > 1 else ''}"
        for group, nbytes, parts in zip(groups, cut.group_nbytes, cut.parts, strict=True)
    ]
    log.info(
        "kvcache: connector: profile %s, L1 of %.1f GiB: %d slots of %d bytes; blocks by group of "
        "layers: %s",
        stack.profile, gib, slab.slots, cut.slot_nbytes, "; ".join(kinds),
    )  # fmt: skip
