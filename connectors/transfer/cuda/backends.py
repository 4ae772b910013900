"""The mechanisms of CUDA, as far as they are here.

`cuMemcpyBatchAsync` by vLLM's operator, for a driver that has it; else `cudaMemcpyAsync` for every
run; and a kernel of Triton's, which comes with torch for CUDA.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from kvcache.connectors.transfer.autotune import CopyBatch, Mechanism
from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.cuda import runtime

log = logging.getLogger(__name__)


def all_of(device: torch.device) -> list[Mechanism]:
    """What can copy here; the first is the one that needs no measuring."""
    found = [batched(), ByPage(), kernel(device)]
    return [mechanism for mechanism in found if mechanism is not None]


class Batched:
    """Copies by vLLM's operator for a batch of them."""

    name = "the copy engine"

    def __init__(self, operator: Any) -> None:
        self._operator = operator

    def takes(self, runs: CopyBatch) -> bool:
        return True

    def copy(self, runs: CopyBatch) -> None:
        self._operator(*map(torch.from_numpy, (runs.sources, runs.targets, runs.nbytes)))


class ByPage:
    """Copies by a call for each run."""

    name = "a call for each page"

    def takes(self, runs: CopyBatch) -> bool:
        return True

    def copy(self, runs: CopyBatch) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        each = zip(runs.targets.tolist(), runs.sources.tolist(), runs.nbytes.tolist(), strict=True)
        for target, source, nbytes in each:
            runtime.copy(target, source, nbytes, stream)


def batched() -> Mechanism | None:
    """What vLLM brings, where there is a vLLM for CUDA."""
    try:
        import vllm._custom_ops
    except ImportError:
        return None
    if not hasattr(torch.ops._C_cache_ops, "swap_blocks_batch"):
        return None
    return Batched(vllm._custom_ops.swap_blocks_batch)


def kernel(device: torch.device) -> Mechanism | None:
    """What Triton makes, where it is installed and compiles."""
    try:
        from kvcache.connectors.transfer.cuda.triton_kernel import Kernel, compiled
    except Exception as error:  # noqa: BLE001 - of somebody else's package; there are other ways
        log.info("kvcache: there are no copies by a kernel here: %s", error)
        return None
    return Kernel(partial(_sent, device)) if compiled() else None


def _sent(device: torch.device, table: Integers) -> torch.Tensor:
    """`table` on the device, in the order of the current stream; nobody waits.

    torch keeps the pinned memory that it is sent from until it has been read, and gives the
    device's again to this stream only, so to what comes after the kernel.
    """
    return torch.from_numpy(table).pin_memory().to(device, non_blocking=True)
