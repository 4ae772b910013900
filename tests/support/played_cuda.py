"""A CUDA that this process plays: torch's streams and the CUDA runtime are fakes.

A stream does its work at once, on memory of this process.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcache.connectors.transfer.cuda import runtime

DEVICE = torch.device("cpu")
DEVICE_NUMBER = 3
STREAM = 77  # the handle of every stream
ILLEGAL_ADDRESS = 700  # cudaErrorIllegalAddress
OTHER_DEVICE = torch.device("meta")  # the current device of a new thread


class FakeRuntime:
    """The functions of libcudart that are called, and the current device of each thread."""

    def __init__(self, device: torch.device = DEVICE) -> None:
        self.device = device
        self.seconds = 0.0
        self.clock: Callable[[], float] = lambda: self.seconds  # of the device
        self.accepts: Callable[[int, int, int], bool] = lambda *run: True
        """Whether the device can access both sides of a run: target, source and bytes."""
        self.registered: dict[int, int] = {}  # bytes by address
        self.address_shift = 0  # from the host's address of registered memory to the device's
        self.pointer_error = 0  # the code that cudaHostGetDevicePointer returns
        self.register_error = 0  # the code that cudaHostRegister returns
        self.pending_error = 0  # the last error, until cudaGetLastError clears it
        self.host_addresses = 1  # whether the device accesses registered memory at host addresses
        self.runs_copied_singly = 0  # by cudaMemcpyAsync
        self.calls: list[str] = []
        self.priorities: list[int] = []  # of the streams that were made
        self.thread = threading.local()
        self.thread.device = device  # an engine has chosen it for this thread
        self.restored: set[torch.device] = set()  # devices that were current again after a stream

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 3  # portable and mapped
        self.check_call()
        if self.register_error:
            self.pending_error = self.register_error
            return self.register_error
        self.calls.append("register")
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.check_call()
        self.calls.append("unregister")
        del self.registered[address]
        return 0

    def cudaHostGetDevicePointer(self, found: Any, address: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        found._obj.value = address + self.address_shift
        self.pending_error = self.pointer_error
        return self.pointer_error

    def cudaDeviceGetPCIBusId(self, text: Any, nbytes: int, device: int) -> int:  # noqa: N802
        text.value = b"0000:3B:00.0"
        return 0 if device == DEVICE_NUMBER and nbytes > len(text.value) else 101

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        before = self.capture_mode()
        self.thread.capture_mode, mode._obj.value = mode._obj.value, before
        return 0

    def capture_mode(self) -> int:
        """Of this thread: 0 is global, the default, and 2 is relaxed."""
        return getattr(self.thread, "capture_mode", 0)

    def check_call(self) -> None:
        """Refuse a call that would end a capture of another thread."""
        assert self.current_device() == self.device
        assert self.capture_mode() == 2

    def cudaGetDevice(self, found: Any) -> int:  # noqa: N802
        assert self.current_device() == self.device
        found._obj.value = DEVICE_NUMBER
        return 0

    def cudaDeviceGetAttribute(self, found: Any, name: int, device: int) -> int:  # noqa: N802
        assert (name, device) == (91, DEVICE_NUMBER)
        found._obj.value = self.host_addresses
        return 0

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, nbytes: int, kind: int, stream: int
    ) -> int:
        assert (kind, stream) == (4, STREAM)
        self.runs_copied_singly += 1
        if not self.accepts(target, source, nbytes):
            return ILLEGAL_ADDRESS
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
        before, self.thread.device = self.current_device(), self.device
        try:
            yield
        finally:
            self.thread.device = before
            self.restored.add(before)

    def is_registered(self, address: int, nbytes: int) -> bool:
        end = address + nbytes
        return any(at <= address and end <= at + size for at, size in self.registered.items())


@dataclass(frozen=True)
class BatchCall:
    """The arguments of a call of `cuMemcpyBatchAsync`, as the driver reads them."""

    targets: list[int]
    sources: list[int]
    nbytes: list[int]
    attributes: tuple[int, ...]  # source order, types and ids of two locations, flags
    first: int  # the first descriptor that has these attributes
    attributes_count: int
    stream: int


_BATCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *[ctypes.c_void_p] * 3,
    ctypes.c_size_t,
    *[ctypes.c_void_p] * 2,
    ctypes.c_size_t,
    *[ctypes.c_void_p] * 2,
)


class FakeDriver:
    """The functions of libcuda that are called. A batch is copied at once."""

    def __init__(self) -> None:
        self.accepts: Callable[[int, int, int], bool] = lambda *run: True  # as of FakeRuntime
        self.batches: list[BatchCall] = []
        self.find_error = 0  # the code that cuGetProcAddress returns
        self.missing = False  # whether cuGetProcAddress finds nothing
        self.failures: dict[int, tuple[int, int]] = {}  # by call: error code, and failed index
        self._entry = _BATCH(self._copy)  # keeps the callback alive

    def cuGetProcAddress_v2(  # noqa: N802
        self, name: bytes, found: Any, version: Any, flags: Any, status: Any
    ) -> int:
        assert (name, version.value, flags.value) == (b"cuMemcpyBatchAsync", 12080, 0)
        if not self.missing and not self.find_error:
            found._obj.value = ctypes.cast(self._entry, ctypes.c_void_p).value
        return self.find_error

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        if code != 1:
            return 1
        text._obj.value = b"invalid argument"
        return 0

    def _copy(self, *arguments: int) -> int:
        targets, sources, sizes, count, attributes, first, number, failed, stream = arguments
        to, at, nbytes = (
            list((ctypes.c_int64 * count).from_address(column))
            for column in (targets, sources, sizes)
        )
        words = struct.unpack("=iiiiiI", ctypes.string_at(attributes, 24))
        begin = ctypes.c_size_t.from_address(first).value
        self.batches.append(BatchCall(to, at, nbytes, words, begin, number, stream))
        if failure := self.failures.get(len(self.batches)):
            ctypes.c_size_t.from_address(failed).value = failure[1]
            return failure[0]
        for run in zip(to, at, nbytes, strict=True):
            if not self.accepts(*run):
                return ILLEGAL_ADDRESS
            ctypes.memmove(*run)
        return 0


class FakeEvent:
    def __init__(self, fake: FakeRuntime) -> None:
        self.fake = fake
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = self.fake.clock()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.fake.calls.append("synchronize")

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
        assert self.fake.current_device() == self.fake.device
        return 0, -5


def install(fake: FakeRuntime, patch: pytest.MonkeyPatch) -> FakeRuntime:
    """Make torch and the library call `fake`; return it."""
    stream = SimpleNamespace(
        cuda_stream=STREAM, wait_event=lambda event: None, wait_stream=lambda other: None
    )
    patch.setattr(runtime, "library", lambda: fake)
    patch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(fake))
    patch.setattr(torch.cuda, "Stream", FakeStreams(fake, stream))
    patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    patch.setattr(torch.cuda, "stream", fake.stream_context)
    patch.setattr(torch.cuda, "device", fake.device_context)
    return fake
