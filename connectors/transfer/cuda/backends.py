"""The copy backends of CUDA, in the order in which they are the default.

The driver's batched copy, where all of the host's memory is pinned and the driver has the call; one
`cudaMemcpyAsync` for each run, everywhere; and a kernel in Triton, which torch for CUDA installs.
"""

from __future__ import annotations

import logging
from functools import partial

import torch

from kvcache.connectors.transfer.autotune import CopyBackend
from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.copy_batch import CopyBatch
from kvcache.connectors.transfer.cuda import runtime
from kvcache.connectors.transfer.cuda.driver import DriverBatch, driver_library

log = logging.getLogger(__name__)


def available(device: torch.device) -> list[CopyBackend]:
    """Return the backends that work here. The first one is the default."""
    backends = [batched_copies(), CopyPerRun(), triton_kernel(device)]
    return [backend for backend in backends if backend is not None]


class BatchedCopies:
    """Copies a batch from or to pinned memory by one call of the driver, or a few.

    NVIDIA documents no rule for other host memory in a batch, so none is passed.
    """

    name = "memcpy-batch"

    def __init__(self, batched: DriverBatch) -> None:
        self._batched = batched

    def supports(self, batch: CopyBatch) -> bool:
        return batch.direction is not None

    def copy(self, batch: CopyBatch) -> None:
        self._batched.copy(batch, torch.cuda.current_stream().cuda_stream)


class CopyPerRun:
    """Copies each run in a call of its own, whatever the host's memory."""

    name = "memcpy"

    def supports(self, batch: CopyBatch) -> bool:
        return True

    def copy(self, batch: CopyBatch) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        columns = batch.targets.tolist(), batch.sources.tolist(), batch.nbytes.tolist()
        for target, source, nbytes in zip(*columns, strict=True):
            runtime.copy(target, source, nbytes, stream)


def batched_copies() -> CopyBackend | None:
    """Return the driver's batched copy, if the driver has it."""
    try:
        return BatchedCopies(DriverBatch(driver_library()))
    except (OSError, RuntimeError) as error:
        log.info(
            "kvcache: copy backend memcpy-batch not available (%s); other backends copy", error
        )
        return None


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
