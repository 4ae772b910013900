"""CUDA as `device` sees it: torch's streams and events, and one call for all pages of a copy.

The call is the one that vLLM brings (`cuMemcpyBatchAsync` where the driver has it), else
`cudaMemcpyAsync` for every page, from the runtime that torch has loaded.

Always true here: an error of CUDA is told, and leaves none behind for the next launch to find.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from kvcache.connectors.copier import Integers

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of this process
_EITHER_WAY = 4  # cudaMemcpyDefault: the addresses say which side is which


class Event:
    """A point in a stream's order, with the time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def passed(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: Event) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3

    def holds(self, stream: torch.cuda.Stream) -> None:
        """What is given to `stream` from now on is done after this point."""
        stream.wait_event(self._event)


class Stream:
    """A CUDA stream, and how pages are copied on it."""

    def __init__(self, stream: torch.cuda.Stream, copy: Callable[..., None]) -> None:
        self._stream = stream
        self._copy = copy

    def mark(self) -> Event:
        return Event(self._stream)

    def after(self, mark: Event) -> None:
        mark.holds(self._stream)

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers) -> None:
        with torch.cuda.stream(self._stream):
            self._copy(targets, sources, nbytes)


class Cuda:
    """One GPU."""

    def __init__(self, device: torch.device) -> None:
        _runtime()  # where there is none this is said at start
        self._device = device
        self._copy = _batched() or _by_page

    def engine(self) -> Stream:
        return Stream(torch.cuda.current_stream(self._device), self._copy)

    def stream(self) -> Stream:
        return Stream(torch.cuda.Stream(self._device), self._copy)

    def pin(self, address: int, nbytes: int) -> str:
        with torch.cuda.device(self._device):
            return _said(_runtime().cudaHostRegister(address, nbytes, _PORTABLE))

    def unpin(self, address: int) -> None:
        with torch.cuda.device(self._device):
            _said(_runtime().cudaHostUnregister(address))


@cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    torch.cuda.init()
    maps = Path("/proc/self/maps").read_text()
    loaded = {line.split()[-1] for line in maps.splitlines() if "libcudart" in line}
    if not loaded:
        raise RuntimeError("no CUDA runtime (libcudart) is loaded, which torch for CUDA does")
    runtime = ctypes.CDLL(min(loaded))
    address, size = ctypes.c_void_p, ctypes.c_size_t
    runtime.cudaHostRegister.argtypes = (address, size, ctypes.c_uint)
    runtime.cudaHostUnregister.argtypes = (address,)
    runtime.cudaMemcpyAsync.argtypes = (address, address, size, ctypes.c_int, address)
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime


def _said(code: int) -> str:
    """What CUDA says went wrong; nothing where all went well."""
    if not code:
        return ""
    _runtime().cudaGetLastError()  # which forgets it
    return f"{_runtime().cudaGetErrorString(code).decode()} (error {code})"


def _batched() -> Callable[..., None] | None:
    """vLLM's operator for a batch of copies; nothing where it is not."""
    try:
        import vllm._custom_ops
    except ImportError:
        return None
    if not hasattr(torch.ops._C_cache_ops, "swap_blocks_batch"):
        return None

    def copy(targets: Integers, sources: Integers, nbytes: Integers) -> None:
        vllm._custom_ops.swap_blocks_batch(
            torch.from_numpy(sources), torch.from_numpy(targets), torch.from_numpy(nbytes)
        )

    return copy


def _by_page(targets: Integers, sources: Integers, nbytes: Integers) -> None:
    runtime, stream = _runtime(), torch.cuda.current_stream().cuda_stream
    for target, source, count in zip(
        targets.tolist(), sources.tolist(), nbytes.tolist(), strict=True
    ):
        if wrong := _said(runtime.cudaMemcpyAsync(target, source, count, _EITHER_WAY, stream)):
            raise RuntimeError(f"a copy of {count} bytes: {wrong}")
