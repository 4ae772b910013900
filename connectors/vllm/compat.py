"""What this connector can work with, said at start: the engine's version, its cache, its host."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache.replica import ALONE, Replica

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

log = logging.getLogger(__name__)

OLDEST_VLLM = (0, 29)


def check_version(version: str) -> None:
    """Refuse a vLLM whose KV cache layouts are not those of 0.29 and later.

    Raises:
        ImportError: naming both versions.
    """
    # A build from source may have no version number, or 0.1.dev; it is taken at its word.
    numbers = re.match(r"(?!0\.1\.dev)(\d+)\.(\d+)", version)
    if numbers and (0, 0) < tuple(map(int, numbers.groups())) < OLDEST_VLLM:
        raise ImportError(
            f"kvcache needs vLLM {'.'.join(map(str, OLDEST_VLLM))} or newer; this is {version}"
        )


def log_as_vllm_does() -> None:
    """Have what kvcache logs said where vLLM's words go, unless somebody saw to it already.

    vLLM gives handlers to the logger ``vllm`` alone; without one, only warnings would be heard.
    """
    ours, theirs = logging.getLogger("kvcache"), logging.getLogger("vllm")
    if not ours.hasHandlers() and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False


def host_name() -> str:
    """One running kernel and pid namespace: the reach of a slab's descriptor."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}/{boot}/{Path('/proc/self/ns/pid').readlink()}"


def replica_of(parallel: ParallelConfig) -> Replica:
    """Which of the replicas that one command has started on this host an engine is.

    vLLM turns the config of a dense model's replica into that of an engine alone, and leaves only
    its rank on the host and the number of all replicas, which may be more than this host has.
    """
    if getattr(parallel, "data_parallel_external_lb", False):
        return ALONE  # a command of its own has started each, with an environment of its own
    index = getattr(parallel, "data_parallel_rank_local", None) or 0
    count = parallel.data_parallel_size_local
    if count < 2 or getattr(parallel, "enable_elastic_ep", False):
        most = getattr(parallel, "elastic_ep_max_dp_size", None) or 1
        count = max(parallel.data_parallel_size, most)
    return Replica(index, max(count, index + 1))


def warn_unless_recomputing(vllm_config: VllmConfig) -> None:
    """Warn when a block that cannot be loaded ends its request, as vLLM's default policy has it.

    To be called in a worker while vLLM makes its connector. Under ``MultiConnector`` a connector
    gets a config whose policy vLLM's scheduler does not read: it follows that of the outer config,
    which is vLLM's current config at that time, and cannot be had in another way.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    transfer = (config or vllm_config).kv_transfer_config or vllm_config.kv_transfer_config
    policy = transfer.kv_load_failure_policy
    if policy != "recompute":
        log.warning(
            "kvcache: kv_load_failure_policy is %r: a block that cannot be copied back "
            "ends its request; with 'recompute' it is computed again",
            policy,
        )
