"""The call of the CUDA driver that copies a batch of runs: `cuMemcpyBatchAsync`.

Neither torch nor the Python of vLLM offers it with every argument. Drivers from CUDA 12.8 on have
it. CUDA 13 gave the name another signature, but its drivers still return the first one if they are
asked for version 12.8.

Sources: `CUmemcpyAttributes_v1`, `CUmemLocation_v1` and the enumerators are in NVIDIA's `cuda.h`,
the signature is `PFN_cuMemcpyBatchAsync_v12080` in `cudaTypedefs.h`.

Invariants:

* One call of the driver has at most `MAX_DESCRIPTORS` descriptors. A descriptor is one run.
* The legacy NULL stream is never passed: the driver refuses it.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from kvcache.connectors.transfer.copy_batch import CopyBatch

MAX_DESCRIPTORS: Final = 4096
"""The most descriptors of one driver call. A call with 51,828 ended the process with driver 580
and CUDA 13.0 (https://github.com/vllm-project/vllm/issues/49276)."""

_VERSION = 12080  # CUDA 12.8: the first version of the call
_LEGACY_STREAMS = (0, 1)  # NULL, and the handle CU_STREAM_LEGACY
_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_ANY_ORDER = 3  # CU_MEMCPY_SRC_ACCESS_ORDER_ANY
_NO_COPY = ctypes.c_size_t(-1).value  # the failed index of an error that concerns no single copy


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    """Attributes of copies. Zeros in the hints and flags are their defaults.

    The driver ignores hints of locations except for managed and pageable memory, and the batches
    here have neither.
    """

    _fields_ = [
        ("source_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    ]


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_ARGUMENTS = (
    _POINTER,  # target addresses
    _POINTER,  # source addresses
    _POINTER,  # sizes
    _SIZE,  # descriptors
    _POINTER,  # attributes
    _POINTER,  # for each of the attributes, the first descriptor that has it
    _SIZE,  # how many attributes there are
    _POINTER,  # receives the index of the descriptor that failed
    _POINTER,  # stream
)
_MemcpyBatch = ctypes.CFUNCTYPE(ctypes.c_int, *_ARGUMENTS)


def driver_library() -> ctypes.CDLL:
    """Return the driver's library, which torch has loaded.

    Raises:
        OSError: when it cannot be loaded.
    """
    return ctypes.CDLL("libcuda.so.1")


class DriverBatch:
    """The driver's batched copy.

    Args:
        library: the driver's library.

    Raises:
        RuntimeError: when the driver lacks the call.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._call: Any = _MemcpyBatch(self._find(b"cuMemcpyBatchAsync"))

    def copy(self, batch: CopyBatch, stream: int) -> None:
        """Queue the copies of `batch` on `stream`. The device reads the arrays during the call.

        A load may read its source before earlier work of the stream is done: its bytes were
        complete before this call, and nothing writes a slot while a load reads it. A store reads
        pages that earlier work of the stream may write, so it reads them in the stream's order.

        Raises:
            RuntimeError: when the driver returns an error. Earlier runs may be in flight.
            ValueError: for arrays or a stream that the driver cannot take.
        """
        if stream in _LEGACY_STREAMS:
            raise ValueError("a batched copy needs a stream of its own, not the default stream")
        columns = (batch.targets, batch.sources, batch.nbytes)
        if not all(column.flags.c_contiguous and column.dtype == "int64" for column in columns):
            raise ValueError("a batched copy needs contiguous arrays of 64-bit integers")
        addresses = [column.ctypes.data for column in columns]
        order = _ANY_ORDER if batch.direction == "load" else _STREAM_ORDER
        attributes, first, failed = _Attributes(order), _SIZE(0), _SIZE(_NO_COPY)
        for begin in range(0, len(batch), MAX_DESCRIPTORS):
            code = self._call(
                *(address + 8 * begin for address in addresses),
                min(MAX_DESCRIPTORS, len(batch) - begin),
                ctypes.addressof(attributes),
                ctypes.addressof(first),
                1,
                ctypes.addressof(failed),
                stream,
            )
            if code:
                run = begin + (0 if failed.value == _NO_COPY else failed.value)
                raise RuntimeError(
                    f"CUDA did not copy {len(batch)} runs from run {run} on: {self._text(code)}"
                )

    def _find(self, name: bytes) -> int:
        found, status = _POINTER(), ctypes.c_int()
        try:
            find = self._library.cuGetProcAddress_v2  # from CUDA 12.0 on
        except AttributeError:
            raise RuntimeError("the driver is older than CUDA 12.8") from None
        version, flags = ctypes.c_int(_VERSION), ctypes.c_uint64(0)
        code = find(name, ctypes.byref(found), version, flags, ctypes.byref(status))
        if code or not found.value:
            raise RuntimeError(f"the driver lacks cuMemcpyBatchAsync (error {code})")
        return found.value

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(code, ctypes.byref(text)) or not text.value:
            return f"error {code}"
        return f"{text.value.decode()} (error {code})"
