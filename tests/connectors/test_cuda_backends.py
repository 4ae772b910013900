"""Which copy backends a machine has."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import numpy as np

from kvcache.connectors.transfer.copy_batch import CopyBatch
from kvcache.connectors.transfer.cuda import backends
from tests.connectors.test_triton_kernel import load
from tests.support.played_cuda import DEVICE, FakeDriver, FakeRuntime, install


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    return install(FakeRuntime(), monkeypatch)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


def available_names() -> list[str]:
    return [backend.name for backend in backends.available(DEVICE)]


def test_available_backends_begin_with_the_batched_copies(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "driver_library", lambda: driver)
    assert available_names() == ["memcpy-batch", "memcpy", "triton"]


def test_available_backends_with_an_old_driver_lack_the_batched_copies(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver.missing = True
    monkeypatch.setattr(backends, "driver_library", lambda: driver)
    with caplog.at_level(logging.INFO):
        assert available_names() == ["memcpy", "triton"]
    [message] = caplog.messages
    assert message == (
        "kvcache: copy backend memcpy-batch not available (the driver lacks cuMemcpyBatchAsync"
        " (error 0)); other backends copy"
    )


@pytest.mark.parametrize(
    ("name", "module"),
    [("kvcache.connectors.transfer.cuda.triton_kernel", load(interpreted=True)), ("triton", None)],
    ids=["interpreted", "no Triton"],
)
def test_available_backends_without_a_compiler_lack_the_kernel(
    name: str, module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "batched_copies", lambda: None)
    monkeypatch.delitem(
        sys.modules, "kvcache.connectors.transfer.cuda.triton_kernel", raising=False
    )
    monkeypatch.setitem(sys.modules, name, module)
    assert available_names() == ["memcpy"]


def test_copy_per_run_that_cuda_refuses_raises_its_error(
    fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "cudaMemcpyAsync", lambda *_: 2)
    one = np.array([1], dtype=np.int64)
    with pytest.raises(RuntimeError, match=r"did not copy 1 bytes: out of memory \(error 2\)"):
        backends.CopyPerRun().copy(CopyBatch(one, one, one, None))
