"""Calls of the CUDA runtime that torch loaded, for what torch offers no function.

Invariant: every CUDA error is returned or raised, and cleared, so that no later launch reports it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of this process
_MAPPED = 2  # cudaHostRegisterMapped: kernels may access it
_DIRECTION_BY_ADDRESS = 4  # cudaMemcpyDefault
_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_HOST_ADDRESS_ALLOWED = 91  # cudaDevAttrCanUseHostPointerForRegisteredMem


@contextmanager
def calls_during_capture() -> Iterator[None]:
    """Allow this thread to pin and to allocate while another thread captures a graph.

    A thread that captures in torch's default mode forbids such calls to all others, since they
    would be missing in the graph. A call makes its capture fail, and so the engine's start. Nothing
    here belongs to a graph. torch allocates pinned memory in the same way.
    """
    mode = ctypes.c_int(_RELAXED)
    _clear_error(library().cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    try:
        yield
    finally:
        _clear_error(library().cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


def pin(address: int, nbytes: int) -> str:
    """Pin host memory for the current device. Returns the cause of a failure, or ""."""
    return _clear_error(library().cudaHostRegister(address, nbytes, _PORTABLE | _MAPPED))


def unpin(address: int) -> None:
    """Undo `pin`."""
    _clear_error(library().cudaHostUnregister(address))


def has_same_address(address: int) -> bool:
    """Whether the current device accesses the pinned memory at `address` at that same address.

    Not in WSL2, for example. A batched copy or a kernel that accesses the host's address there
    ends all work of the process on the device.
    """
    device, allowed, found = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    failure = _clear_error(library().cudaGetDevice(ctypes.byref(device)))
    failure = failure or _clear_error(
        library().cudaDeviceGetAttribute(ctypes.byref(allowed), _HOST_ADDRESS_ALLOWED, device.value)
    )
    if failure or not allowed.value:
        return False
    failure = _clear_error(library().cudaHostGetDevicePointer(ctypes.byref(found), address, 0))
    return not failure and found.value == address


def pci_address(device: int) -> str:
    """Return the address of a device on the PCI bus, as ``/sys`` has it; "" if CUDA fails."""
    text = ctypes.create_string_buffer(16)
    failure = _clear_error(library().cudaDeviceGetPCIBusId(text, len(text), device))
    return "" if failure else text.value.decode().lower()


def copy(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy on a stream.

    Raises:
        RuntimeError: when CUDA returns an error.
    """
    if cause := _clear_error(
        library().cudaMemcpyAsync(target, source, nbytes, _DIRECTION_BY_ADDRESS, stream)
    ):
        raise RuntimeError(f"CUDA did not copy {nbytes} bytes: {cause}")


@cache
def library() -> ctypes.CDLL:
    """Return the runtime library.

    Raises:
        RuntimeError: when torch loaded none.
    """
    torch.cuda.init()
    maps = Path("/proc/self/maps").read_text()
    # The sixth field is the path, which may contain spaces.
    found = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libcudart" in line}
    if not found:
        raise RuntimeError("no CUDA runtime (libcudart) is loaded; torch for CUDA loads it")
    runtime = ctypes.CDLL(min(found))
    address, size = ctypes.c_void_p, ctypes.c_size_t
    runtime.cudaHostRegister.argtypes = (address, size, ctypes.c_uint)
    runtime.cudaHostUnregister.argtypes = (address,)
    runtime.cudaHostGetDevicePointer.argtypes = (ctypes.POINTER(address), address, ctypes.c_uint)
    runtime.cudaMemcpyAsync.argtypes = (address, address, size, ctypes.c_int, address)
    runtime.cudaDeviceGetPCIBusId.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    number = ctypes.POINTER(ctypes.c_int)
    runtime.cudaGetDevice.argtypes = (number,)
    runtime.cudaThreadExchangeStreamCaptureMode.argtypes = (number,)
    runtime.cudaDeviceGetAttribute.argtypes = (number, ctypes.c_int, ctypes.c_int)
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime


def _clear_error(code: int) -> str:
    """Return the description of an error code and clear the error; "" for success."""
    if not code:
        return ""
    library().cudaGetLastError()
    return f"{library().cudaGetErrorString(code).decode()} (error {code})"
