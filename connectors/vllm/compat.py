"""What the connector depends on in vLLM and its host: version, logging, hosts, replicas."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache.connectors.vllm.vllm_names import (
    FAILED_LOADS,
    LIVE_TABLES,
    NEWEST_VLLM,
    OLDEST_VLLM,
    STATES,
    VLLM_NAMES,
    Version,
    has_name,
    missing_names,
)
from kvcache.replica import ALONE, Replica

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)


def hooks_refusal(specs: Sequence[str], *, states: bool) -> str | None:
    """Return why this vLLM lacks a hook that several KV cache groups, or a special one, need.

    Args:
        specs: the names of the groups' cache specs.
        states: whether one of them keeps states.
    """
    import vllm

    hooks = {FAILED_LOADS: "report failed loads of them", LIVE_TABLES: "list their blocks"}
    if states:
        hooks[STATES] = "hand their states to a connector"
    for name, ability in hooks.items():
        if not has_name(name):
            since = _text(VLLM_NAMES[name])
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


def version_of(version: str) -> Version | None:
    """Return the minor version of a release; ``None`` for a build that has no such number."""
    # A build from source may have no version number, or 0.1.dev.
    numbers = re.match(r"(?!0\.1\.dev)(\d+)\.(\d+)", version)
    minor = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    return minor if minor > (0, 0) else None


def check_vllm(version: str) -> None:
    """Refuse a vLLM that is too old, or lacks names that the connector needs.

    Call it when the connector is imported. vLLM's first process imports it before it starts others,
    so that the error is there once.

    Raises:
        ImportError: with the version, and the oldest supported version or the names.
    """
    minor = version_of(version)
    if minor is not None and minor < OLDEST_VLLM:
        raise ImportError(f"kvcache needs vLLM {_text(OLDEST_VLLM)} or newer; this is {version}")
    needed, _ = missing_names(minor)
    if needed:
        raise ImportError(
            f"kvcache does not run with vLLM {version}, which lacks {', '.join(needed)}; use vLLM "
            f"{_text(OLDEST_VLLM)} to {_text(NEWEST_VLLM)}, with which kvcache was tested"
        )


def warn_of_untested_vllm(version: str) -> None:
    """Warn if vLLM is newer than the newest tested version. Call it once for each engine."""
    minor = version_of(version)
    if minor is None or minor <= NEWEST_VLLM:
        return
    _, others = missing_names(minor)
    log.warning(
        "kvcache: connector: vLLM %s is untested (kvcache was tested with vLLM %s to %s); "
        "continuing without %s",
        version,
        _text(OLDEST_VLLM),
        _text(NEWEST_VLLM),
        ", ".join(others) or "restrictions",
    )


def _text(version: Version) -> str:
    return ".".join(map(str, version))


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
