"""The driver's batched copy, with a fake driver that copies memory of this process."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np

from kvcache.connectors.transfer.copy_batch import CopyBatch, Direction
from kvcache.connectors.transfer.cuda.driver import MAX_DESCRIPTORS, DriverBatch
from tests.support.played_cuda import FakeDriver

STREAM, NO_COPY = 0x7F00DEADBEE0, 2**64 - 1
STREAM_ORDER, ANY_ORDER = 1, 3


class TwoMemories:
    """Runs of 16 bytes, copied in a random order from one memory to another."""

    def __init__(self, runs: int, direction: Direction = "load") -> None:
        random = np.random.default_rng(runs)
        self.source = random.integers(0, 256, (runs, 16), dtype=np.uint8)
        self.target = np.zeros_like(self.source)
        self.to, self.at = random.permutation(runs), random.permutation(runs)
        self.batch = CopyBatch(
            self.target.ctypes.data + 16 * self.to,
            self.source.ctypes.data + 16 * self.at,
            np.full(runs, 16, dtype=np.int64),
            direction,
        )

    def copied(self, runs: int | None = None) -> bool:
        """Whether exactly the first `runs` runs were copied; None: all."""
        expected = np.zeros_like(self.target)
        expected[self.to[:runs]] = self.source[self.at[:runs]]
        return bool((self.target == expected).all())


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.mark.parametrize(("direction", "order"), [("load", ANY_ORDER), ("store", STREAM_ORDER)])
def test_copy_passes_all_runs_in_one_call(
    driver: FakeDriver, direction: Direction, order: int
) -> None:
    memories = TwoMemories(100, direction)
    DriverBatch(driver).copy(memories.batch, STREAM)
    [call] = driver.batches
    assert call.targets == memories.batch.targets.tolist()
    assert call.sources == memories.batch.sources.tolist()
    assert call.nbytes == [16] * 100
    assert call.attributes == (order, 0, 0, 0, 0, 0)
    assert (call.first, call.attributes_count, call.stream) == (0, 1, STREAM)
    assert memories.copied()


@pytest.mark.parametrize(
    ("runs", "calls"),
    [
        (0, []),
        (1, [1]),
        (MAX_DESCRIPTORS, [MAX_DESCRIPTORS]),
        (MAX_DESCRIPTORS + 1, [MAX_DESCRIPTORS, 1]),
        (51_828, [MAX_DESCRIPTORS] * 12 + [51_828 - 12 * MAX_DESCRIPTORS]),
    ],
)
def test_copy_of_many_runs_makes_calls_of_at_most_4096(
    driver: FakeDriver, runs: int, calls: list[int]
) -> None:
    memories = TwoMemories(runs)
    DriverBatch(driver).copy(memories.batch, STREAM)
    assert [len(call.nbytes) for call in driver.batches] == calls
    assert memories.copied()


@pytest.mark.parametrize(
    ("code", "index", "text"),
    [
        (1, 5, r"10000 runs from run 4101 on: invalid argument \(error 1\)"),
        (1, NO_COPY, r"10000 runs from run 4096 on: invalid argument \(error 1\)"),
        (999, NO_COPY, r"10000 runs from run 4096 on: error 999"),
    ],
)
def test_copy_with_a_call_that_fails_raises_and_makes_no_more_calls(
    driver: FakeDriver, code: int, index: int, text: str
) -> None:
    memories = TwoMemories(10_000)
    driver.failures[2] = code, index
    with pytest.raises(RuntimeError, match=f"^CUDA did not copy {text}$"):
        DriverBatch(driver).copy(memories.batch, STREAM)
    assert len(driver.batches) == 2
    assert memories.copied(MAX_DESCRIPTORS)


@pytest.mark.parametrize("stream", [0, 1])
def test_copy_on_the_default_stream_raises(driver: FakeDriver, stream: int) -> None:
    with pytest.raises(ValueError, match="needs a stream of its own"):
        DriverBatch(driver).copy(TwoMemories(1).batch, stream)
    assert not driver.batches


@pytest.mark.parametrize("change", [lambda column: column[::2], lambda column: column.astype("i4")])
def test_copy_of_arrays_that_the_driver_would_misread_raises(
    driver: FakeDriver, change: Any
) -> None:
    batch = TwoMemories(8).batch
    sizes = change(batch.nbytes)
    with pytest.raises(ValueError, match="contiguous arrays of 64-bit integers"):
        DriverBatch(driver).copy(CopyBatch(batch.targets, batch.sources, sizes, None), STREAM)
    assert not driver.batches


def test_driver_without_the_call_is_refused(driver: FakeDriver) -> None:
    with pytest.raises(RuntimeError, match=r"older than CUDA 12\.8"):
        DriverBatch(object())
    driver.missing = True
    with pytest.raises(RuntimeError, match=r"lacks cuMemcpyBatchAsync \(error 0\)"):
        DriverBatch(driver)
    driver.find_error = 1
    with pytest.raises(RuntimeError, match=r"lacks cuMemcpyBatchAsync \(error 1\)"):
        DriverBatch(driver)


C_DRIVER = """
#include <cuda.h>
#include <cudaTypedefs.h>
#include <string.h>

long long seen[8];

static CUresult CUDAAPI copy(
    CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
    CUmemcpyAttributes *attributes, size_t *first, size_t number, size_t *failed, CUstream stream)
{
    seen[0] = count;
    seen[1] = attributes->srcAccessOrder;
    seen[2] = attributes->srcLocHint.type | attributes->srcLocHint.id;
    seen[3] = attributes->dstLocHint.type | attributes->dstLocHint.id;
    seen[4] = attributes->flags;
    seen[5] = *first;
    seen[6] = number;
    seen[7] = (long long)stream;
    for (size_t run = 0; run < count; run++) {
        if (sizes[run] > 16) {
            *failed = run;
            return CUDA_ERROR_INVALID_VALUE;
        }
        memcpy((void *)targets[run], (void *)sources[run], sizes[run]);
    }
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetProcAddress(
    const char *name, void **found, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *status)
{
    PFN_cuMemcpyBatchAsync_v12080 function = copy;
    int known = !strcmp(name, "cuMemcpyBatchAsync") && version == 12080 && !flags;
    *found = known ? (void *)function : 0;
    *status = known ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorString(CUresult code, const char **text)
{
    *text = code == CUDA_ERROR_INVALID_VALUE ? "from C" : 0;
    return CUDA_SUCCESS;
}

int any_order(void) { return CU_MEMCPY_SRC_ACCESS_ORDER_ANY; }
int stream_order(void) { return CU_MEMCPY_SRC_ACCESS_ORDER_STREAM; }
"""


@pytest.fixture
def c_driver(tmp_path: Path) -> ctypes.CDLL:
    """A driver in C, compiled with NVIDIA's headers, which come with Triton."""
    triton, compiler = importlib.util.find_spec("triton"), shutil.which("cc")
    if not triton or not triton.origin or not compiler:
        pytest.skip("no C compiler, or no headers of CUDA")
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    source, library = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(C_DRIVER)
    options = ["-Werror", "-shared", "-fPIC", "-I", str(headers), "-o", str(library)]
    subprocess.run([compiler, *options, str(source)], check=True)
    return ctypes.CDLL(str(library))


def test_call_has_the_signature_and_layouts_of_the_headers(c_driver: ctypes.CDLL) -> None:
    batched = DriverBatch(c_driver)
    seen = (ctypes.c_longlong * 8).in_dll(c_driver, "seen")
    orders: dict[Direction, int] = {
        "load": c_driver.any_order(), "store": c_driver.stream_order()
    }  # fmt: skip
    for direction, order in orders.items():
        memories = TwoMemories(300, direction)
        batched.copy(memories.batch, STREAM)
        assert memories.copied()
        assert list(seen) == [300, order, 0, 0, 0, 0, 1, STREAM]
    memories.batch.nbytes[7] = 17
    with pytest.raises(RuntimeError, match=r"300 runs from run 7 on: from C \(error 1\)$"):
        batched.copy(memories.batch, STREAM)
