"""A forked child cannot use or close either side of its parent's vLLM connector."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import torch

from kvcache.connectors.vllm.messages import Step, Transfer
from kvcache.slab import PAGE, Slab
from tests.support.forked_children import methods_usable_in_child
from tests.support.played_engine import BLOCK, Request, opened
from tests.support.recording_worker import one_piece, side

pytestmark = pytest.mark.engine


def test_scheduler_side_in_a_forked_child_refuses_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    played, request = opened(monkeypatch, 8), Request("a", 3 * BLOCK)
    played.keep(request, [0, 1, 2])
    assert methods_usable_in_child(played.side) == []
    assert played.held(request) == [True] * 3
    played.side.close()


def test_worker_side_in_a_forked_child_refuses_calls() -> None:
    pages = {name: torch.rand(16, 2, 32, 8) for name in ("one", "two")}
    before = pages["one"][3].clone()
    worker = side()
    worker.register(pages)
    shard = worker.shard()
    assert shard is not None
    [nbytes] = shard.nbytes
    slab = Slab.create(2, -(-nbytes // PAGE) * PAGE)
    memory = one_piece(slab.descriptor, nbytes)
    worker.load(Step(memory))
    worker.store(Step(memory, stores=[Transfer(1, [3], [1])]))
    assert worker.copier is not None
    assert methods_usable_in_child(worker, worker.copier) == []
    worker.load(Step(memory, loads=[Transfer(2, [7], [1])]))
    assert worker.take_failed_blocks() == set()
    assert torch.equal(pages["one"][7], before)
    worker.close()
    slab.close()
