"""A GPU as a `streams.Device`, by torch, and the trial of the copy backends on it.

Invariants:

* The trial does not disturb the engine. It runs in its own thread, on its own stream and memory,
  when the first memory is pinned.
* Pinning and the trial may run while the engine captures graphs.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvcache.connectors.transfer.autotune import (
    FULL_TRIAL,
    BackendSelector,
    ByteArray,
    CopyBackend,
    TrialSize,
    run_trial,
)
from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.copy_batch import PinnedRanges
from kvcache.connectors.transfer.cuda import runtime
from kvcache.connectors.transfer.cuda.backends import available

log = logging.getLogger(__name__)


class CudaEvent:
    """A point in the order of a stream, with its time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: CudaEvent) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Make the work queued on `stream` from now on wait for this point."""
        stream.wait_event(self._event)


class CudaStream:
    """A CUDA stream, and the backends that copy on it."""

    def __init__(
        self, stream: torch.cuda.Stream, selector: BackendSelector, pinned: PinnedRanges
    ) -> None:
        self._stream = stream
        self._selector = selector
        self._pinned = pinned

    def record(self) -> CudaEvent:
        return CudaEvent(self._stream)

    def wait_for(self, event: CudaEvent) -> None:
        event.hold(self._stream)

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        with torch.cuda.stream(self._stream):
            self._selector.copy(self._pinned.batch(targets, sources, nbytes))


class CudaDevice:
    """One GPU, which copies by the best of `backends`; by default, of all available ones."""

    def __init__(
        self,
        device: torch.device,
        backends: Sequence[CopyBackend] = (),
        *,
        trial_size: TrialSize = FULL_TRIAL,
    ) -> None:
        runtime.library()  # raises at start where there is none
        self.backends = tuple(backends or available(device))
        self.selector = BackendSelector(self.backends)
        self._device = device
        self._trial_size = trial_size
        self._pinned = PinnedRanges()
        self._trial: threading.Thread | None = None

    @property
    def pci_address(self) -> str:
        number = self._device.index
        return runtime.pci_address(torch.cuda.current_device() if number is None else number)

    def engine_stream(self) -> CudaStream:
        return CudaStream(torch.cuda.current_stream(self._device), self.selector, self._pinned)

    def new_stream(self, *, background: bool = False) -> CudaStream:
        return CudaStream(self._make_stream(background), self.selector, self._pinned)

    def pin(self, address: int, nbytes: int) -> str:
        # While memory is pinned, the driver holds a lock, and the trial would measure waits.
        self.wait_for_trial()
        with torch.cuda.device(self._device), runtime.calls_during_capture():
            if cause := _pin(address, nbytes, self._pinned):
                return cause
        if self._trial is None:
            self._trial = threading.Thread(
                target=self._run_trial, name="kvcache-trial", daemon=True
            )
            self._trial.start()
        return ""

    def unpin(self, address: int) -> None:
        # The caller is closing. The trial must not use the device after that.
        self.wait_for_trial()
        with torch.cuda.device(self._device), runtime.calls_during_capture():
            _unpin(address, self._pinned)

    def wait_for_trial(self) -> None:
        """Wait until the trial has ended, if it was started."""
        if self._trial is not None:
            self._trial.join()

    def _make_stream(self, background: bool) -> torch.cuda.Stream:
        """Return a new stream with the device's lowest priority (`background`) or highest one.

        The engine computes on streams of priority 0, which is the lowest of every CUDA device
        (c10/cuda/CUDAStream.h asserts it). So a copy that the engine waits for has the highest
        priority: else its kernel would queue behind those of the engine. Priorities order the
        kernels of the copies. Copy engines ignore them (`cudaStreamCreateWithPriority`).
        """
        with torch.cuda.device(self._device):
            lowest, highest = torch.cuda.Stream.priority_range()
        return torch.cuda.Stream(self._device, priority=lowest if background else highest)

    def _run_trial(self) -> None:
        try:
            stream = self._make_stream(background=True)
            # The device first: when torch leaves a stream, it restores the device that was current
            # before. In a new thread that would be the first GPU, and a process that uses another
            # GPU would allocate memory there.
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(stream),
                runtime.calls_during_capture(),
            ):
                scratch = _CudaScratch(self._device, self._trial_size.scratch_nbytes)
                try:
                    run_trial(self.selector, scratch, self._trial_size)
                finally:
                    scratch.close()
        except Exception as error:  # noqa: BLE001 - the default backend needs no trial
            log.warning(
                "kvcache: copy backends: trial failed (%s); the default backend copies", error
            )


class _CudaScratch:
    """The memory of a trial. The current stream is used.

    torch keeps the freed device memory in its pool. It returns the pool to CUDA before it reports
    that memory ran out.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.nbytes = nbytes
        self.device = _TensorMemory(torch.empty(nbytes, dtype=torch.uint8, device=device))
        mapped = mmap.mmap(-1, nbytes)
        self.host = _TensorMemory(torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8)))
        self._pinned = PinnedRanges()
        if cause := _pin(self.host.address, nbytes, self._pinned):
            raise RuntimeError(cause)
        self.batch = self._pinned.batch

    def seconds(self, work: Callable[[], None]) -> float:
        begin = CudaEvent(torch.cuda.current_stream())
        try:
            work()
        finally:
            end = CudaEvent(torch.cuda.current_stream())
            end.wait()
        return end.seconds_since(begin)

    def close(self) -> None:
        _unpin(self.host.address, self._pinned)


class _TensorMemory:
    """The memory of a tensor, as a `TrialMemory`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.address = int(tensor.data_ptr())

    def write(self, data: ByteArray) -> None:
        self._tensor[: data.nbytes].copy_(torch.from_numpy(data))

    def clear(self, nbytes: int) -> None:
        self._tensor[:nbytes].zero_()

    def read(self, nbytes: int) -> ByteArray:
        data: ByteArray = self._tensor[:nbytes].cpu().numpy()
        return data


def _pin(address: int, nbytes: int, pinned: PinnedRanges) -> str:
    """Pin memory for the current device, and add it to `pinned` if kernels may access it."""
    if cause := runtime.pin(address, nbytes):
        return cause
    if runtime.has_same_address(address):
        pinned.add(address, nbytes)
    return ""


def _unpin(address: int, pinned: PinnedRanges) -> None:
    pinned.remove(address)
    runtime.unpin(address)
