"""Which layers a forward pass is trusted to ask for before it reads them."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.layer_sync import pass_mode
from kvcache.connectors.vllm.messages import Step, Transfer
from kvcache.connectors.vllm.worker import WorkerSide
from tests.support.reordering_device import ReorderingDevice
from tests.support.worker_half import NOWHERE, Copier, side, step

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("mode", "computes", "kind"),
    [
        ("NONE", True, "NONE"),
        ("PIECEWISE", True, "PIECEWISE"),
        ("FULL", True, None),
        ("NONE", False, None),  # so the second runner says FULL, and a step without tokens is told
    ],
)
def test_which_forward_passes_ask_for_layers(mode: str, computes: bool, kind: str | None) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import ForwardContext

    context = ForwardContext(
        no_compile_layers={},
        attn_metadata={} if computes else None,
        slot_mapping={},
        cudagraph_runtime_mode=CUDAGraphMode[mode],
    )
    assert pass_mode(context) == kind


def test_a_context_that_says_nothing_asks_for_nothing() -> None:
    new = SimpleNamespace(name="NEW")
    assert pass_mode(None) is None
    assert pass_mode(SimpleNamespace(attn_metadata={})) is None
    assert pass_mode(SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=new)) is None


def on_a_device(copier: Copier) -> WorkerSide:
    return side(copier, device=ReorderingDevice(Random(0)))


def forward(worker: WorkerSide, kind: str | None, *asks: str) -> list[int]:
    """One step with loads, whose forward pass asks for these layers; those that were announced."""
    worker.load(step(), kind)
    for name in asks:
        worker.wait_for_layer(name)
    worker.store(step())
    copier: Any = worker.copier
    return list(copier.announced)


def test_layers_are_announced_once_a_pass_has_asked_for_them() -> None:
    worker = on_a_device(Copier())
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == [0, 1]


def test_a_step_without_loads_teaches_as_well() -> None:
    worker = on_a_device(Copier())
    for name in ("one", "two"):
        worker.wait_for_layer(name)
    worker.load(Step(NOWHERE), "NONE")  # which vLLM begins after the forward pass then
    worker.store(Step(NOWHERE))
    assert forward(worker, "NONE") == [0, 1]


def test_a_layer_that_was_not_asked_for_is_there_before() -> None:
    worker = on_a_device(Copier())
    forward(worker, "NONE", "two")
    assert forward(worker, "NONE", "one", "two") == [1]
    assert forward(worker, "NONE", "two") == [0, 1]
    assert forward(worker, "NONE", "two") == [1]  # the last pass did without the first


def test_a_pass_that_asks_for_nothing_has_all_before_it_and_teaches_nothing() -> None:
    worker = on_a_device(Copier())
    assert forward(worker, None, "one", "two") == []
    assert forward(worker, None, "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, None) == []
    assert forward(worker, "NONE") == [0, 1]


def test_what_one_kind_of_pass_asks_for_says_nothing_of_another() -> None:
    worker = on_a_device(Copier())
    forward(worker, "NONE", "one", "two")
    assert forward(worker, "PIECEWISE", "one") == []
    assert forward(worker, "PIECEWISE", "one") == [0]
    assert forward(worker, "NONE", "one", "two") == [0, 1]


def test_layers_are_reached_by_name_and_a_strangers_name_reaches_all() -> None:
    copier = Copier()
    worker = on_a_device(copier)
    side().wait_for_layer("one")  # before there is a copier there is nothing to wait for
    worker.load(step(), "NONE")
    for name in ("two", "one", "two", "alias of any"):
        worker.wait_for_layer(name)
    assert copier.reached == [1, 0, 1, None]
    worker.store(Step(NOWHERE))
    assert copier.reached == [1, 0, 1, None, None]  # also in a step that stores nothing


def test_a_pass_that_did_not_ask_what_it_was_trusted_to_is_not_believed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = on_a_device(Copier())
    assert not forward(worker, "NONE", "one", "two")
    assert not worker.take_failed_blocks()
    worker.take_received()
    worker.take_acks()
    forward(worker, "NONE", "one")
    [said] = caplog.records
    assert "read 1 layers without waiting for them" in said.getMessage()
    assert worker.take_failed_blocks() == {10, 11, 12}
    worker.take_received()
    acks = worker.take_acks()
    assert acks is not None
    assert acks.failed == {3, 4}  # the stores: what L1 has is as good as it was
    assert forward(worker, "NONE", "one") == [0]
    assert not worker.take_failed_blocks()


def test_who_awaits_nothing_may_ask_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    worker = on_a_device(Copier())
    forward(worker, "NONE", "one", "two")
    later = Step(NOWHERE, loads=[Transfer(1, [10], [0], awaited_by="waits")])
    worker.load(later, "NONE")
    worker.store(later)
    assert not worker.take_failed_blocks()
    assert not caplog.records


def test_on_a_processor_all_is_there_before(caplog: pytest.LogCaptureFixture) -> None:
    worker = side(Copier())
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == []
    forward(worker, "NONE")
    assert not worker.take_failed_blocks()
    assert not caplog.records
