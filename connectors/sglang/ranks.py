"""Which rank of an SGLang server this process is: in the names of pages, and on this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcache.replica import ALONE, Replica

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig


def place_of(config: HiCacheStorageConfig, *, shared: bool) -> tuple[object, ...]:
    """Return the values that distinguish pages of this rank from those of other ranks.

    Ranks of data parallelism are left out: they compute equal pages.

    Args:
        config: SGLang's config of the backend.
        shared: whether all tensor-parallel ranks have equal pages.
    """
    tensor = () if shared else ("tp", config.tp_rank)
    return (
        *tensor,
        *("pp", config.pp_rank),
        *("cp", config.attn_cp_rank),
        *("dcp", config.dcp_rank),
    )


def replica_of(config: HiCacheStorageConfig) -> Replica:
    """Return the number of this rank among the ranks on this host.

    Each rank is a process of its own, so each needs its own directory of a disk tier.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    try:
        width, rank = parallel.launch_world_size, parallel.launch_world_rank
        servers, server, hosts = parallel.dp_size, parallel.dp_rank, parallel.nnodes
    except (AttributeError, RuntimeError, ValueError):  # outside of a server: nothing is published
        width, rank = config.tp_size * config.pp_size, config.tp_rank
        rank += config.tp_size * config.pp_rank
        servers, server, hosts = 1, 0, 1
    on_host = max(1, width * max(1, servers) // max(1, hosts))
    index = (rank + width * (server or 0)) % on_host
    return Replica(index, on_host) if on_host > 1 else ALONE
