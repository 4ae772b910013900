"""The layers that a forward pass is expected to wait for before it reads them."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Step, Transfer
from kvcache.connectors.vllm.worker.layer_sync import pass_mode
from kvcache.connectors.vllm.worker.side import WorkerSide
from tests.support.recording_worker import NOWHERE, RecordingCopier, side, step
from tests.support.reordering_device import ReorderingDevice

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("mode", "computes", "expected"),
    [
        ("NONE", True, "NONE"),
        ("PIECEWISE", True, "PIECEWISE"),
        ("FULL", True, None),
        ("NONE", False, None),  # a FULL graph in the second runner, and a step without tokens
    ],
)
def test_pass_mode_is_that_of_passes_with_layer_waits(
    mode: str, computes: bool, expected: str | None
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import ForwardContext

    context = ForwardContext(
        no_compile_layers={},
        attn_metadata={} if computes else None,
        slot_mapping={},
        cudagraph_runtime_mode=CUDAGraphMode[mode],
    )
    assert pass_mode(context) == expected


def test_pass_mode_of_an_unknown_context_is_none() -> None:
    new = SimpleNamespace(name="NEW")
    assert pass_mode(None) is None
    assert pass_mode(SimpleNamespace(attn_metadata={})) is None
    assert pass_mode(SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=new)) is None


def on_a_device(copier: RecordingCopier) -> WorkerSide:
    return side(copier, device=ReorderingDevice(Random(0)))


def forward(worker: WorkerSide, mode: str | None, *waits: str) -> list[int]:
    """Run a step with loads and a pass that waits for ``waits``; return the announced layers."""
    worker.load(step(), mode)
    for name in waits:
        worker.wait_for_layer(name)
    worker.store(step())
    copier: Any = worker.copier
    return list(copier.announced)


def test_layers_that_the_last_pass_waited_for_are_announced() -> None:
    worker = on_a_device(RecordingCopier())
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == [0, 1]


def test_layers_of_a_pass_without_loads_are_announced_next() -> None:
    worker = on_a_device(RecordingCopier())
    for name in ("one", "two"):
        worker.wait_for_layer(name)
    worker.load(Step(NOWHERE), "NONE")  # after the forward pass, as vLLM does without sync loads
    worker.store(Step(NOWHERE))
    assert forward(worker, "NONE") == [0, 1]


def test_layer_without_a_wait_is_loaded_before_the_next_pass() -> None:
    worker = on_a_device(RecordingCopier())
    forward(worker, "NONE", "two")
    assert forward(worker, "NONE", "one", "two") == [1]
    assert forward(worker, "NONE", "two") == [0, 1]
    assert forward(worker, "NONE", "two") == [1]  # the last pass did not wait for the first layer


def test_pass_without_a_mode_announces_nothing_and_changes_nothing() -> None:
    worker = on_a_device(RecordingCopier())
    assert forward(worker, None, "one", "two") == []
    assert forward(worker, None, "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, None) == []
    assert forward(worker, "NONE") == [0, 1]


def test_layers_are_expected_by_mode() -> None:
    worker = on_a_device(RecordingCopier())
    forward(worker, "NONE", "one", "two")
    assert forward(worker, "PIECEWISE", "one") == []
    assert forward(worker, "PIECEWISE", "one") == [0]
    assert forward(worker, "NONE", "one", "two") == [0, 1]


def test_wait_for_an_unknown_layer_waits_for_all() -> None:
    copier = RecordingCopier()
    worker = on_a_device(copier)
    side().wait_for_layer("one")  # without a copier there is no copy to wait for
    worker.load(step(), "NONE")
    for name in ("two", "one", "two", "alias of any"):
        worker.wait_for_layer(name)
    assert copier.waits == [1, 0, 1, None]
    worker.store(Step(NOWHERE))
    assert copier.waits == [1, 0, 1, None, None]  # a step without stores waits, too


def test_pass_that_skips_an_expected_wait_fails_its_loads_and_stores(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = on_a_device(RecordingCopier())
    assert not forward(worker, "NONE", "one", "two")
    assert not worker.take_failed_blocks()
    worker.take_received()
    worker.take_acks()
    forward(worker, "NONE", "one")
    [record] = caplog.records
    assert "read 1 layers without waiting for them" in record.getMessage()
    assert worker.take_failed_blocks() == {10, 11, 12}
    worker.take_received()
    acks = worker.take_acks()
    assert acks is not None
    assert acks.failed == {3, 4}  # the stores; the loaded blocks stay in L1
    assert forward(worker, "NONE", "one") == [0]
    assert not worker.take_failed_blocks()


def test_pass_with_async_loads_alone_may_skip_waits(caplog: pytest.LogCaptureFixture) -> None:
    worker = on_a_device(RecordingCopier())
    forward(worker, "NONE", "one", "two")
    later = Step(NOWHERE, loads=[Transfer(1, [10], [0], awaited_by="waits")])
    worker.load(later, "NONE")
    worker.store(later)
    assert not worker.take_failed_blocks()
    assert not caplog.records


def test_pass_on_a_cpu_announces_nothing_and_may_skip_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = side(RecordingCopier())
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == []
    forward(worker, "NONE")
    assert not worker.take_failed_blocks()
    assert not caplog.records
