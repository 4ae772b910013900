"""Opens the tiers of one rank of an SGLang server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcache.connectors.sglang.identity import identity, log_sharing
from kvcache.connectors.sglang.options import StorageOptions
from kvcache.connectors.sglang.ranks import replica_of
from kvcache.connectors.sglang.weight_updates import WeightUpdates
from kvcache.keys import namespace
from kvcache.lower.direct import DirectTiers
from kvcache.profiles import open_tiers

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

log = logging.getLogger(__name__)

ORIGIN = "--hicache-storage-backend-extra-config: tiers"


def open_for_rank(
    config: HiCacheStorageConfig,
    options: StorageOptions,
    pool: Any,
    *,
    part_nbytes: Sequence[int],
    shares_pages: bool,
    updates: WeightUpdates,
    token: str,
) -> tuple[DirectTiers, bytes]:
    """Open the tiers of this rank; return them and the namespace of their blocks.

    Args:
        config: SGLang's config of the backend.
        options: the options of the backend.
        pool: SGLang's host pool of KV.
        part_nbytes: the bytes of each part of a page, of all host pools.
        shares_pages: whether tensor-parallel ranks share the pages of a pool.
        updates: the updates of the weights of this process.
        token: the text that all ranks of this server share.

    Raises:
        ValueError: if the options or the profile are wrong, or a tier cannot be opened.
    """
    fields = identity(config, pool, explicit=options.identity, updates=updates, token=token)
    digest = namespace(fields)
    tiers = open_tiers(
        options.profile,
        tiers=options.tiers,
        block_nbytes=max(part_nbytes, default=1),
        namespace=digest,
        element_nbytes=getattr(getattr(pool, "dtype", None), "itemsize", 2),
        identity=fields,
        replica=replica_of(config),
        origin=ORIGIN,
    )
    if shares_pages and config.tp_size > 1:
        try:
            _check_shared(tiers, config.tp_size)
        except ValueError:
            tiers.close()
            raise
    log_sharing(fields)
    return tiers, digest


def _check_shared(tiers: DirectTiers, ranks: int) -> None:
    """Raise ValueError if no rank can read what the writing rank stores."""
    private = [each.name for each in tiers.names if each.kind == "disk"]
    if len(private) == len(tiers.names):
        raise ValueError(
            f"the {ranks} tensor-parallel ranks share pages (MLA), and only one process can open a "
            "disk tier; list a tier that ranks can share, such as redis, or use data-parallel "
            "attention"
        )
    if private:
        log.warning(
            "kvcache: sglang: %d tensor-parallel ranks share pages (MLA), and only one process can "
            "open tier %s; ranks find the pages of the other tiers",
            ranks,
            ", ".join(private),
        )
