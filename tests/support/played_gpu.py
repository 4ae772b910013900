"""A GPU that this process plays, with memory of its own, for programs that make tensors on it.

The memory is memory of this process. The device refuses to copy it once its last tensor is gone:
torch reuses the memory of a GPU, and a copy would then read or write another tensor.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kvcache.connectors.transfer.cuda import backends
from tests.support.played_cuda import FakeDriver, FakeRuntime, install

GPU = torch.device("cuda", 0)


class PlayedMemory:
    """The tensors on the GPU."""

    def __init__(self) -> None:
        self._live: dict[int, int] = {}  # bytes by address

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor of zeros."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = np.zeros(nbytes, dtype=np.uint8)
        self._live[memory.ctypes.data] = nbytes
        weakref.finalize(memory, self._live.pop, memory.ctypes.data)
        return torch.from_numpy(memory).view(dtype).reshape(tuple(shape))

    def accepts(self, target: int, source: int, nbytes: int) -> bool:
        """Whether one side of a run lies in a tensor on the GPU."""
        return self._contains(target, nbytes) or self._contains(source, nbytes)

    def _contains(self, address: int, nbytes: int) -> bool:
        live = list(self._live.items())
        return any(begin <= address and address + nbytes <= begin + size for begin, size in live)


@dataclass(frozen=True)
class PlayedGpu:
    """The libraries of CUDA that the copies call."""

    runtime: FakeRuntime
    driver: FakeDriver


def install_gpu(patch: pytest.MonkeyPatch) -> PlayedGpu:
    """Make torch and the library use the played GPU, which has no Triton."""
    memory, fake, driver = PlayedMemory(), FakeRuntime(GPU), FakeDriver()
    fake.accepts = driver.accepts = memory.accepts
    fake.clock = time.perf_counter
    install(fake, patch)
    patch.setattr(backends, "driver_library", lambda: driver)
    patch.setattr(backends, "triton_kernel", lambda device: None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "a played GPU")
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    for name in ("zeros", "empty", "randn"):
        patch.setattr(torch, name, _maker(memory, getattr(torch, name)))
    return PlayedGpu(fake, driver)


def _maker(memory: PlayedMemory, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_tensor(
        shape: Any, *, dtype: torch.dtype, device: Any = None, pin_memory: bool = False
    ) -> torch.Tensor:
        if device == GPU:
            sizes = (shape,) if isinstance(shape, int) else shape
            return memory.tensor(sizes, dtype).copy_(make(shape, dtype=dtype))
        return make(shape, dtype=dtype)

    return make_tensor
