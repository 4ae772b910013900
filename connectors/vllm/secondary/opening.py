"""Opens the tiers of a secondary tier, under the identity of the engine's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm

from kvcache.connectors.vllm.compat import replica_of, warn_of_untested_vllm
from kvcache.connectors.vllm.identity.fields import log_sharing
from kvcache.connectors.vllm.secondary.options import SecondaryOptions
from kvcache.connectors.vllm.secondary.rows_identity import (
    element_nbytes,
    engine_configs,
    rows_identity,
)
from kvcache.keys import namespace
from kvcache.lower.direct import DirectTiers
from kvcache.profiles import open_tiers
from kvcache.replica import ALONE

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec


def open_rows_tiers(
    spec: OffloadingSpec, options: SecondaryOptions, tier_type: str, row_nbytes: int
) -> DirectTiers:
    """Open the tiers that ``options`` name, for blocks of ``row_nbytes`` bytes.

    Call it while vLLM constructs the secondary tier.

    Args:
        spec: as vLLM passes it to the secondary tier.
        options: of the secondary tier.
        tier_type: the ``type`` in vLLM's configuration, for errors and metrics.
        row_nbytes: bytes of a row.

    Raises:
        ProfileError: if the profile or the list of tiers is wrong, or a tier cannot be opened.
    """
    configs = engine_configs(spec.config.engine_id)
    replica = ALONE if configs is None else replica_of(configs.vllm.parallel_config)
    if replica.index == 0:
        warn_of_untested_vllm(vllm.__version__)
    fields = rows_identity(spec, row_nbytes, configs)
    tiers = open_tiers(
        options.profile,
        tiers=options.tiers,
        block_nbytes=row_nbytes,
        namespace=namespace(fields),
        element_nbytes=element_nbytes(spec.config.model.dtype),
        identity=fields,
        replica=replica,
        origin=f"{tier_type}.tiers",
    )
    if configs is not None:
        log_sharing(fields, lower=True)
    return tiers
