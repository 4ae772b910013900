"""The copy backends of CUDA.

vLLM's operator for `cuMemcpyBatchAsync`, if the driver has that, or else one `cudaMemcpyAsync` for
each run; and a kernel in Triton, which torch for CUDA installs.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from kvcache.connectors.transfer.autotune import CopyBackend, CopyBatch
from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.cuda import runtime

log = logging.getLogger(__name__)


def available(device: torch.device) -> list[CopyBackend]:
    """Return the backends that work here. The first one is the default."""
    backends = [batched_copies(), CopyPerRun(), triton_kernel(device)]
    return [backend for backend in backends if backend is not None]


class BatchedCopies:
    """Copies a batch in one call, by vLLM's operator."""

    name = "memcpy-batch"

    def __init__(self, operator: Any) -> None:
        self._operator = operator

    def supports(self, batch: CopyBatch) -> bool:
        return True

    def copy(self, batch: CopyBatch) -> None:
        # The operator takes the sources first.
        self._operator(*map(torch.from_numpy, (batch.sources, batch.targets, batch.nbytes)))


class CopyPerRun:
    """Copies each run in a call of its own."""

    name = "memcpy"

    def supports(self, batch: CopyBatch) -> bool:
        return True

    def copy(self, batch: CopyBatch) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        columns = batch.targets.tolist(), batch.sources.tolist(), batch.nbytes.tolist()
        for target, source, nbytes in zip(*columns, strict=True):
            runtime.copy(target, source, nbytes, stream)


def batched_copies() -> CopyBackend | None:
    """Return vLLM's operator, if a vLLM for CUDA is installed."""
    try:
        import vllm._custom_ops
    except ImportError:
        return None
    if not hasattr(torch.ops._C_cache_ops, "swap_blocks_batch"):
        return None
    return BatchedCopies(vllm._custom_ops.swap_blocks_batch)


def triton_kernel(device: torch.device) -> CopyBackend | None:
    """Return the kernel, if Triton is installed and compiles."""
    try:
        from kvcache.connectors.transfer.cuda.triton_kernel import TritonKernel, compiled
    except Exception as error:  # noqa: BLE001 - third-party code; other backends copy without it
        log.info("kvcache: copy backend triton not available (%s); other backends copy", error)
        return None
    return TritonKernel(partial(_send, device)) if compiled() else None


def _send(device: torch.device, table: Integers) -> torch.Tensor:
    """Copy `table` to the device in the order of the current stream, without blocking.

    torch keeps the pinned source until it has been read. It reuses the memory on the device for
    this stream only, so after the kernel.
    """
    return torch.from_numpy(table).pin_memory().to(device, non_blocking=True)
