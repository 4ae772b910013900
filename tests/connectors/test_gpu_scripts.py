"""The scripts of `tests/gpu`, as far as they run without a GPU."""

from __future__ import annotations

import ctypes
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from kvcache.connectors.transfer.copy_batch import CopyBatch
from kvcache.connectors.transfer.cuda import driver, runtime
from tests.gpu import engine, probe

RESULT: dict[str, Any] = {
    "equal": {"computed": 3, "own": 3, "restored": 3},
    "cached": [480, 480, 480],
    "ttft_ms": {"without": 40.0, "computed": 41.0, "own": 4.0, "restored": 5.0},
    "loss": [-0.001, 0.004, 0.006],
    "pinned_slots": 0,
}


class HostEvent:
    """A CUDA event by the host's clock."""

    def __init__(self, **options: bool) -> None:
        self.at = 0.0

    def record(self, stream: object) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


class HostBatch:
    """The driver's batched copy, by `memmove`."""

    def __init__(self, library: object) -> None:
        self.library = library

    def copy(self, batch: CopyBatch, stream: int) -> None:
        columns = (batch.targets.tolist(), batch.sources.tolist(), batch.nbytes.tolist())
        for target, source, nbytes in zip(*columns, strict=True):
            ctypes.memmove(target, source, nbytes)


@pytest.fixture
def host_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the probe measure the host in place of a GPU, with little memory."""
    for name, value in {
        "Event": HostEvent,
        "Stream": lambda: SimpleNamespace(cuda_stream=7),
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "get_device_name": lambda device: "a host",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, _on_host(getattr(torch, name)))
    monkeypatch.setattr(runtime, "pin", lambda address, nbytes: "")
    monkeypatch.setattr(runtime, "unpin", lambda address: None)
    library = SimpleNamespace(cudaDeviceGetAttribute=lambda *arguments: 0)
    monkeypatch.setattr(runtime, "library", lambda: library)
    monkeypatch.setattr(driver, "driver_library", lambda: None)
    monkeypatch.setattr(driver, "DriverBatch", HostBatch)
    monkeypatch.setattr(driver, "MAX_DESCRIPTORS", driver.MAX_DESCRIPTORS)
    for name, value in {"KIB": 1 << 8, "MIB": 1 << 14, "GIB": 1 << 20, "ROUNDS": 2}.items():
        monkeypatch.setattr(probe, name, value)


def _on_host(make: Any) -> Any:
    def make_on_host(*arguments: Any, **options: Any) -> Any:
        options.pop("device", None)
        options.pop("pin_memory", None)
        return make(*arguments, **options)

    return make_on_host


def test_probe_prints_every_part(host_as_device: None, capsys: pytest.CaptureFixture[str]) -> None:
    probe.print_attributes()
    probe.print_pinning()
    probe.print_order()
    probe.print_descriptors(64)
    printed = capsys.readouterr().out
    assert "CanUseHostPointerForRegisteredMem: 0" in printed
    assert "slowest launch" in printed
    assert printed.count("any order") == len(probe.RUNS)
    assert "64 descriptors, store" in printed


def test_probe_without_a_gpu_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.main() == 0
    assert "nothing to measure" in capsys.readouterr().out


def test_engine_table_has_a_column_for_each_runner(capsys: pytest.CaptureFixture[str]) -> None:
    engine.print_table(engine.CPU_PLAN, {"0": RESULT, "1": RESULT})
    lines = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in lines} == {4}
    assert "| first token, hit in L1 | 5.00 ms | 5.00 ms |" in lines
    assert engine.problems(engine.CPU_PLAN, {"0": RESULT, "1": RESULT}, gpu=True) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"equal": {"computed": 3, "own": 3, "restored": 2}}, "1 answers differ: restored"),
        ({"cached": [480, 0, 480]}, "hits of [480, 0, 480] tokens; at least 480 expected"),
        ({"loss": [0.0, 0.02, 0.03]}, "2.00% lost without hits; at most 0.5 %"),
        ({"pinned_slots": 2}, "2 slots are still pinned"),
    ],
)
def test_engine_reports_each_problem(change: dict[str, Any], problem: str) -> None:
    [found] = engine.problems(engine.CPU_PLAN, {"1": RESULT | change}, gpu=True)
    assert found == f"vLLM's second model runner: {problem}"
