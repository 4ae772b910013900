"""`tests/bench/gpu.py` from beginning to end, on a GPU that this process plays."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from kvcache.connectors.transfer.autotune import TrialSize
from tests.bench import gpu
from tests.support.played_gpu import PlayedGpu, install_gpu

SMALL = gpu.Workload(
    nbytes=512 << 10,
    block=64 << 10,
    page=8 << 10,
    pages=(4 << 10, 64 << 10),
    rounds=2,
    factor=8,
    products=1,
    trial=TrialSize(scratch_nbytes=512 << 10, runs=16, rounds=1),
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGpu]:
    yield install_gpu(monkeypatch)
    logging.disable(logging.NOTSET)


def test_bench_prints_both_tables(device: PlayedGpu, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(SMALL)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "a played GPU"
    for name in gpu.FLOORS:
        [line] = [line for line in lines if line.startswith(name.ljust(16))]
        assert f"{gpu.FLOORS[name]:.2f}" in line
    for page in SMALL.pages:
        for backend in ("memcpy-batch", "memcpy"):
            begin = f"{page >> 10:4} KiB by {backend:13}"
            [line] = [line for line in lines if line.startswith(begin)]
            assert len(line.removeprefix(begin).split()) == len(gpu.FLOORS) + len(gpu.CALLS)
    missed = int(lines[-1].partition(" floors missed")[0])
    assert status == (1 if missed else 0)


def test_bench_keeps_the_pages_that_it_copies(device: PlayedGpu) -> None:
    rig = gpu.Rig(SMALL, SMALL.page)
    rig.copy_pages("load", "store")
    del rig.pages
    with pytest.raises(RuntimeError, match="CUDA did not copy"):
        rig.copy_pages("load")
    rig.close()


def test_bench_uses_the_backend_of_each_row(device: PlayedGpu) -> None:
    rig = gpu.Rig(SMALL, SMALL.page)
    batched, per_run = rig.cuda.selector.enabled
    for backend, copied in ((batched, (1, 0)), (per_run, (0, len(rig.low) * 8))):
        rig.use(backend)
        before = len(device.driver.batches), device.runtime.runs_copied_singly
        rig.copy_pages("load")
        after = len(device.driver.batches), device.runtime.runs_copied_singly
        assert (after[0] - before[0], after[1] - before[1]) == copied
    rig.close()


def test_bench_without_a_gpu_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(SMALL) == 0
    assert capsys.readouterr().out == "no CUDA device; nothing to measure\n"
