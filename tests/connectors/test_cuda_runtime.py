"""The calls of the CUDA runtime with the real library, on a machine without a driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from kvcache.connectors.transfer.cuda import runtime
from kvcache.slab import Slab


@pytest.fixture(autouse=True)
def _loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Load the library, as torch for CUDA does."""
    found = sorted(Path("/usr/local").glob("cuda*/lib*/libcudart.so.1[2-9]*"))
    if not found or torch.cuda.is_available():
        pytest.skip("no CUDA runtime, or also a driver")
    ctypes.CDLL(str(found[0]))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    runtime.library.cache_clear()
    yield
    runtime.library.cache_clear()


def test_calls_report_that_the_driver_is_missing() -> None:
    slab = Slab.create(1, 4096)
    with runtime.calls_during_capture():
        assert "driver" in runtime.pin(slab.address, slab.nbytes)
        runtime.unpin(slab.address)
    assert not runtime.has_same_address(slab.address)
    with pytest.raises(RuntimeError, match=r"did not copy 16 bytes: .*driver"):
        runtime.copy(slab.address, slab.address, 16, stream=0)
    slab.close()
