"""What the connector depends on in vLLM and its host: version, logging, hosts, replicas, policy."""

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
    """Refuse a vLLM older than 0.29: its KV cache layouts are different.

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
