"""What the connector depends on in vLLM and its host: names, version, logging, hosts, replicas.

`VLLM_NAMES` lists the names of vLLM that changed in a supported version, or that vLLM may change
without notice.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvcache.replica import ALONE, Replica

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)

Version = tuple[int, int]

OLDEST_VLLM: Final[Version] = (0, 28)

_BASE = "distributed.kv_transfer.kv_connector.v1.base"
_FAILED_LOADS = f"{_BASE}:KVConnectorTransferResults.failed_recving"
_STATES = "v1.core.sched.output:KVConnectorBlockState.boundary_state_offloads"
LAYOUTS: Final = "v1.kv_cache_layout:KVCacheLayout.BLNHC"
_LIVE_TABLES = "v1.core.sched.output:KVConnectorBlockState.get_block_ids"

VLLM_NAMES: Final[Mapping[str, Version]] = {
    # Loads and stores of several groups
    f"{_BASE}:SupportsHMA.request_finished_all_groups": (0, 28),
    f"{_BASE}:KVConnectorBase_V1.get_transfer_results": (0, 30),
    _FAILED_LOADS: (0, 30),
    _STATES: (0, 29),
    _LIVE_TABLES: (0, 30),
    f"{_BASE}:KVConnectorBase_V1.get_loaded_kv_cache_group_ids": (0, 32),
    # Groups and the cache specs of layers
    "v1.kv_cache_interface:KVCacheConfig.hash_block_size": (0, 32),
    "v1.core.kv_cache_utils:resolve_kv_cache_block_sizes": (0, 28),
    "v1.kv_cache_interface:KVCacheGroupSpec.enable_kv_transfer": (0, 29),
    "v1.kv_cache_interface:SlidingWindowSpec.extra_retained_tokens": (0, 28),
    "v1.kv_cache_interface:MambaSpec.mamba_cache_mode": (0, 28),
    "v1.kv_cache_interface:MambaSpec.tp_replicated": (0, 29),
    "v1.kv_cache_interface:AttentionSpec.max_tp_shards": (0, 31),
    # Layouts of the KV cache
    LAYOUTS: (0, 29),
    # KV events
    "v1.kv_cache_interface:get_kv_cache_spec_kind": (0, 28),
    "v1.kv_cache_interface:get_kv_cache_spec_sliding_window": (0, 28),
    "v1.core.kv_cache_utils:maybe_convert_block_hash": (0, 28),
    "v1.core.kv_cache_utils:generate_block_hash_extra_keys": (0, 28),
    "v1.core.kv_cache_utils:to_event_extra_keys": (0, 31),
    # Metrics
    "v1.metrics.cache_hit_source:CacheHitSource.HOST": (0, 32),
}
"""By ``module:name`` below ``vllm``: the first supported minor version that has it."""


@cache
def has_name(name: str) -> bool:
    """Whether the installed vLLM has a name of `VLLM_NAMES`.

    The names decide, not the version: a build from source may have any version number.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(f"vllm.{module}")
    except ImportError:
        return False
    for part in path.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        if part not in fields and not hasattr(found, part):
            return False
        found = getattr(found, part, None)
    return True


def hooks_refusal(specs: Sequence[str], *, states: bool) -> str | None:
    """Return why this vLLM lacks a hook that several KV cache groups, or a special one, need.

    Args:
        specs: the names of the groups' cache specs.
        states: whether one of them keeps states.
    """
    import vllm

    hooks = {_FAILED_LOADS: "report failed loads of them", _LIVE_TABLES: "list their blocks"}
    if states:
        hooks[_STATES] = "hand their states to a connector"
    for name, ability in hooks.items():
        if not has_name(name):
            since = ".".join(map(str, VLLM_NAMES[name]))
            return (
                f"its KV cache groups are {', '.join(specs)}, and vLLM {vllm.__version__} cannot "
                f"{ability}; vLLM {since} can"
            )
    return None


def hash_tokens(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Return how many tokens each block hash of a request adds to the one before it."""
    if (tokens := getattr(kv_cache_config, "hash_block_size", None)) is not None:
        return int(tokens)
    groups = kv_cache_config.kv_cache_groups
    if len(groups) == 1:
        return int(groups[0].kv_cache_spec.block_size)
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    return int(resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1])


def check_version(version: str) -> None:
    """Refuse a vLLM older than `OLDEST_VLLM`.

    Raises:
        ImportError: naming both versions.
    """
    # A build from source may have no version number, or 0.1.dev. It is not refused.
    numbers = re.match(r"(?!0\.1\.dev)(\d+)\.(\d+)", version)
    if numbers and (0, 0) < tuple(map(int, numbers.groups())) < OLDEST_VLLM:
        raise ImportError(
            f"kvcache needs vLLM {'.'.join(map(str, OLDEST_VLLM))} or newer; this is {version}"
        )


def log_as_vllm_does() -> None:
    """Send kvcache's log to the handlers of vLLM's, unless it has handlers already.

    vLLM adds handlers to the logger ``vllm`` alone; without any, Python prints only warnings.
    """
    ours, vllms = logging.getLogger("kvcache"), logging.getLogger("vllm")
    if not ours.hasHandlers() and vllms.handlers:
        ours.handlers = list(vllms.handlers)
        ours.setLevel(vllms.level)
        ours.propagate = False


def host_name() -> str:
    """Return the name of this kernel and pid namespace, within which a slab can be attached."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}/{boot}/{Path('/proc/self/ns/pid').readlink()}"


def replica_of(parallel: ParallelConfig) -> Replica:
    """Return which of the replicas that one command started on this host an engine is.

    vLLM replaces the parallel config of a dense model's replica by that of a single engine. It
    keeps the rank on the host and the number of all replicas, which may be on several hosts.
    """
    if getattr(parallel, "data_parallel_external_lb", False):
        return ALONE  # each was started by a command of its own, with an environment of its own
    index = getattr(parallel, "data_parallel_rank_local", None) or 0
    count = parallel.data_parallel_size_local
    if count < 2 or getattr(parallel, "enable_elastic_ep", False):
        largest = getattr(parallel, "elastic_ep_max_dp_size", None) or 1
        count = max(parallel.data_parallel_size, largest)
    return Replica(index, max(count, index + 1))


def recomputes_failed_loads(vllm_config: VllmConfig) -> bool:
    """Whether this vLLM correctly recomputes blocks that could not be loaded.

    With async scheduling it keeps the placeholders of tokens that were computed from those blocks,
    and its second model runner continues at the old position (vLLM 0.25 to 0.33 at least).
    """
    scheduling = getattr(vllm_config, "scheduler_config", None)
    second_runner = getattr(vllm_config, "use_v2_model_runner", False)
    return not (getattr(scheduling, "async_scheduling", False) or second_runner)


def warn_unless_recomputing(vllm_config: VllmConfig) -> None:
    """Warn if vLLM fails a request when a block cannot be loaded, as its default policy does.

    Call it in a worker while vLLM constructs its connector. Under ``MultiConnector``, vLLM follows
    the policy of the outer config, and passes another config to the connector. The outer one is
    vLLM's current config at that time, and cannot be reached otherwise.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    transfer = (config or vllm_config).kv_transfer_config or vllm_config.kv_transfer_config
    policy = transfer.kv_load_failure_policy
    if policy != "recompute":
        log.warning(
            "kvcache: connector: kv_load_failure_policy is %r, not 'recompute'; "
            "vLLM fails a request when one of its blocks cannot be loaded",
            policy,
        )
