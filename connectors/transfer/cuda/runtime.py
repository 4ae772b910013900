"""The CUDA runtime that torch has loaded, where torch has no call of its own.

Always true here: an error of CUDA is told, and leaves none behind for the next launch to find.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of this process
_MAPPED = 2  # cudaHostRegisterMapped: a kernel may touch it
_EITHER_WAY = 4  # cudaMemcpyDefault: the addresses say which side is which


def pin(address: int, nbytes: int) -> str:
    """Register host memory for the current device; why that failed, or nothing."""
    return _said(loaded().cudaHostRegister(address, nbytes, _PORTABLE | _MAPPED))


def unpin(address: int) -> None:
    """Undo `pin`."""
    _said(loaded().cudaHostUnregister(address))


def same_address(address: int) -> bool:
    """Whether a kernel finds the pinned memory at `address` there too.

    It does where `cudaDevAttrCanUseHostPointerForRegisteredMem` says so; this asks for the thing.
    """
    found = ctypes.c_void_p()
    wrong = _said(loaded().cudaHostGetDevicePointer(ctypes.byref(found), address, 0))
    return not wrong and found.value == address


def copy(target: int, source: int, nbytes: int, stream: int) -> None:
    """Begin to copy on a stream.

    Raises:
        RuntimeError: when CUDA refuses.
    """
    if wrong := _said(loaded().cudaMemcpyAsync(target, source, nbytes, _EITHER_WAY, stream)):
        raise RuntimeError(f"a copy of {nbytes} bytes: {wrong}")


@cache
def loaded() -> ctypes.CDLL:
    """The library itself.

    Raises:
        RuntimeError: where there is none.
    """
    torch.cuda.init()
    maps = Path("/proc/self/maps").read_text()
    found = {line.split()[-1] for line in maps.splitlines() if "libcudart" in line}
    if not found:
        raise RuntimeError("no CUDA runtime (libcudart) is loaded, which torch for CUDA does")
    runtime = ctypes.CDLL(min(found))
    address, size = ctypes.c_void_p, ctypes.c_size_t
    runtime.cudaHostRegister.argtypes = (address, size, ctypes.c_uint)
    runtime.cudaHostUnregister.argtypes = (address,)
    runtime.cudaHostGetDevicePointer.argtypes = (ctypes.POINTER(address), address, ctypes.c_uint)
    runtime.cudaMemcpyAsync.argtypes = (address, address, size, ctypes.c_int, address)
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime


def _said(code: int) -> str:
    """What CUDA says went wrong; nothing where all went well."""
    if not code:
        return ""
    loaded().cudaGetLastError()  # which forgets it
    return f"{loaded().cudaGetErrorString(code).decode()} (error {code})"
