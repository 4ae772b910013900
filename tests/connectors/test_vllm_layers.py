"""Which layers a forward pass is trusted to ask for before it reads them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Step
from kvcache.connectors.vllm.worker import WorkerSide
from tests.connectors.workers import NOWHERE, Copier, side, step

pytestmark = pytest.mark.engine


def forward(worker: WorkerSide, kind: str | None, *asks: str) -> list[int]:
    """One step with loads, whose forward pass asks for these layers; those that were announced."""
    worker.load(step(), kind)
    for name in asks:
        worker.reach(name)
    worker.store(step())
    copier: Any = worker.copier
    return list(copier.announced)


def test_layers_are_announced_once_a_pass_has_asked_for_them() -> None:
    worker = side(Copier())
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == [0, 1]


def test_a_step_without_loads_teaches_as_well() -> None:
    worker = side(Copier())
    for name in ("one", "two"):
        worker.reach(name)
    worker.load(Step(NOWHERE), "NONE")  # which vLLM begins after the forward pass then
    worker.store(Step(NOWHERE))
    assert forward(worker, "NONE") == [0, 1]


def test_a_layer_that_was_not_asked_for_is_there_before() -> None:
    worker = side(Copier())
    forward(worker, "NONE", "two")
    assert forward(worker, "NONE", "one", "two") == [1]
    assert forward(worker, "NONE", "two") == [0, 1]
    assert forward(worker, "NONE", "two") == [1]  # the last pass did without the first


def test_a_pass_that_asks_for_nothing_has_all_before_it_and_teaches_nothing() -> None:
    worker = side(Copier())
    assert forward(worker, None, "one", "two") == []
    assert forward(worker, None, "one", "two") == []
    assert forward(worker, "NONE", "one", "two") == []
    assert forward(worker, None) == []
    assert forward(worker, "NONE") == [0, 1]


def test_what_one_kind_of_pass_asks_for_says_nothing_of_another() -> None:
    worker = side(Copier())
    forward(worker, "NONE", "one", "two")
    assert forward(worker, "PIECEWISE", "one") == []
    assert forward(worker, "PIECEWISE", "one") == [0]
    assert forward(worker, "NONE", "one", "two") == [0, 1]


def test_layers_are_reached_by_name_and_a_strangers_name_reaches_all() -> None:
    copier = Copier()
    worker = side(copier)
    side().reach("one")  # before there is a copier there is nothing to wait for
    worker.load(step(), "NONE")
    for name in ("two", "one", "two", "alias of any"):
        worker.reach(name)
    assert copier.reached == [1, 0, 1, None]
    worker.store(Step(NOWHERE))
    assert copier.reached == [1, 0, 1, None, None]  # also in a step that stores nothing
