"""A CUDA that this process plays: torch's streams and the CUDA runtime are fakes.

A stream does its work at once, on memory of this process.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcache.connectors.transfer.cuda import runtime

DEVICE = torch.device("cpu")
OTHER_DEVICE = torch.device("meta")  # the current device of a new thread


class FakeRuntime:
    """The functions of libcudart that are called, and the current device of each thread."""

    def __init__(self) -> None:
        self.seconds = 0.0  # the device's clock
        self.registered: dict[int, int] = {}  # bytes by address
        self.address_shift = 0  # from the host's address of registered memory to the device's
        self.pointer_error = 0  # the code that cudaHostGetDevicePointer returns
        self.register_error = 0  # the code that cudaHostRegister returns
        self.pending_error = 0  # the last error, until cudaGetLastError clears it
        self.calls: list[str] = []
        self.priorities: list[int] = []  # of the streams that were made
        self.thread = threading.local()
        self.thread.device = DEVICE  # an engine has chosen it for this thread
        self.restored: set[torch.device] = set()  # devices that were current again after a stream

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 3  # portable and mapped
        assert self.current_device() == DEVICE
        if self.register_error:
            self.pending_error = self.register_error
            return self.register_error
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append("unregister")
        del self.registered[address]
        return 0

    def cudaHostGetDevicePointer(self, found: Any, address: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        found._obj.value = address + self.address_shift
        self.pending_error = self.pointer_error
        return self.pointer_error

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, nbytes: int, kind: int, stream: int
    ) -> int:
        assert (kind, stream) == (4, 0)
        ctypes.memmove(target, source, nbytes)
        self.seconds += 3e-6
        return 0

    def cudaGetErrorString(self, code: int) -> bytes:  # noqa: N802
        return b"out of memory"

    def cudaGetLastError(self) -> int:  # noqa: N802
        code, self.pending_error = self.pending_error, 0
        return code

    def current_device(self) -> torch.device:
        return getattr(self.thread, "device", OTHER_DEVICE)

    @contextmanager
    def device_context(self, device: torch.device) -> Iterator[None]:
        before, self.thread.device = self.current_device(), device
        yield
        self.thread.device = before

    @contextmanager
    def stream_context(self, stream: object) -> Iterator[None]:
        """Restores the stream and so the device that were current before, as torch does."""
        before, self.thread.device = self.current_device(), DEVICE
        try:
            yield
        finally:
            self.thread.device = before
            self.restored.add(before)

    def is_registered(self, address: int, nbytes: int) -> bool:
        end = address + nbytes
        return any(at <= address and end <= at + size for at, size in self.registered.items())


class FakeEvent:
    def __init__(self, fake: FakeRuntime) -> None:
        self.fake = fake
        self.seconds = 0.0

    def record(self, stream: object) -> None:
        self.seconds = self.fake.seconds

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


class FakeStreams:
    """`torch.cuda.Stream`: the priorities of an H100, and one stream for all."""

    def __init__(self, fake: FakeRuntime, stream: object) -> None:
        self.fake = fake
        self.stream = stream

    def __call__(self, device: torch.device, priority: int = 0) -> object:
        self.fake.priorities.append(priority)
        return self.stream

    def priority_range(self) -> tuple[int, int]:
        assert self.fake.current_device() == DEVICE
        return 0, -5


def install(fake: FakeRuntime, patch: pytest.MonkeyPatch) -> None:
    """Make torch and the library call `fake`."""
    stream = SimpleNamespace(cuda_stream=0, wait_event=lambda event: None)
    patch.setattr(runtime, "library", lambda: fake)
    patch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(fake))
    patch.setattr(torch.cuda, "Stream", FakeStreams(fake, stream))
    patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    patch.setattr(torch.cuda, "stream", fake.stream_context)
    patch.setattr(torch.cuda, "device", fake.device_context)
