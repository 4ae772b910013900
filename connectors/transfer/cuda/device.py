"""A GPU as `streams` has devices, by torch; and the trial of what can copy on it.

Always true here: mechanisms are tried in nobody's way, in a thread and on a stream and memory of
their own, when the first memory is pinned: later than an engine captures its graphs.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvcache.connectors.transfer.autotune import (
    FEW,
    SIZES,
    Bytes,
    Mechanism,
    Mechanisms,
    Pinned,
    measure,
)
from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.cuda import backends, runtime

log = logging.getLogger(__name__)

# On each side, for a moment: 16 MiB, twice what is copied, for half of it has to stay as it was.
# torch keeps the device's afterwards, and gives it back before anybody is told that there is none.
_SCRATCH = 2 * FEW * SIZES[-1]


class CudaEvent:
    """A point in a stream's order, with the time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: CudaEvent) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3

    def holds(self, stream: torch.cuda.Stream) -> None:
        """What is given to `stream` from now on is done after this point."""
        stream.wait_event(self._event)


class CudaStream:
    """A CUDA stream, and how pages are copied on it."""

    def __init__(self, stream: torch.cuda.Stream, mechanisms: Mechanisms, pinned: Pinned) -> None:
        self._stream = stream
        self._mechanisms = mechanisms
        self._pinned = pinned

    def record(self) -> CudaEvent:
        return CudaEvent(self._stream)

    def wait_for(self, mark: CudaEvent) -> None:
        mark.holds(self._stream)

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        with torch.cuda.stream(self._stream):
            self._mechanisms.copy(self._pinned.runs(targets, sources, nbytes))


class Cuda:
    """One GPU, and the mechanisms that are `offered`; all there are, where none is named."""

    def __init__(self, device: torch.device, offered: Sequence[Mechanism] = ()) -> None:
        runtime.loaded()  # where there is none this is said at start
        self.offered = tuple(offered or backends.all_of(device))
        self.mechanisms = Mechanisms(self.offered)
        self._device = device
        self._pinned = Pinned()
        self._trial: threading.Thread | None = None

    def engine_stream(self) -> CudaStream:
        return CudaStream(torch.cuda.current_stream(self._device), self.mechanisms, self._pinned)

    def new_stream(self) -> CudaStream:
        return CudaStream(self._own(), self.mechanisms, self._pinned)

    def pin(self, address: int, nbytes: int) -> str:
        with torch.cuda.device(self._device):
            if why := _pin(address, nbytes, self._pinned):
                return why
        if self._trial is None:
            self._trial = threading.Thread(target=self._try, name="kvcache-trial", daemon=True)
            self._trial.start()
        return ""

    def unpin(self, address: int) -> None:
        self.wait_tried()  # who unpins is about to end
        with torch.cuda.device(self._device):
            _unpin(address, self._pinned)

    def wait_tried(self) -> None:
        """Wait until every mechanism has been tried, if that was begun."""
        if self._trial is not None:
            self._trial.join()

    def _own(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def _try(self) -> None:
        try:
            # The device first: a thread goes back from a stream to the device it was on, and at the
            # start that is the first one, which a process of another would take memory of.
            with torch.cuda.device(self._device), torch.cuda.stream(self._own()):
                scratch = _Scratch(self._device)
                try:
                    measure(self.mechanisms, scratch)
                finally:
                    scratch.close()
        except Exception as error:  # noqa: BLE001 - what needs no trial goes on
            log.warning("kvcache: ways to copy were not tried, the first one is used: %s", error)


class _Scratch:
    """Where mechanisms are tried, on the current stream."""

    nbytes = _SCRATCH

    def __init__(self, device: torch.device) -> None:
        self.device = _Bytes(torch.empty(self.nbytes, dtype=torch.uint8, device=device))
        mapped = mmap.mmap(-1, self.nbytes)
        self.host = _Bytes(torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8)))
        self._pinned = Pinned()
        if why := _pin(self.host.address, self.nbytes, self._pinned):
            raise RuntimeError(why)
        self.runs = self._pinned.runs

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


class _Bytes:
    """A tensor's memory, for a trial."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.address = int(tensor.data_ptr())

    def put(self, data: Bytes) -> None:
        self._tensor.copy_(torch.from_numpy(data))

    def clear(self) -> None:
        self._tensor.zero_()

    def get(self) -> Bytes:
        found: Bytes = self._tensor.cpu().numpy()
        return found


def _pin(address: int, nbytes: int, pinned: Pinned) -> str:
    """Pin for the current device, and note it if a kernel may touch it."""
    if why := runtime.pin(address, nbytes):
        return why
    if runtime.same_address(address):
        pinned.add(address, nbytes)
    return ""


def _unpin(address: int, pinned: Pinned) -> None:
    pinned.remove(address)
    runtime.unpin(address)
