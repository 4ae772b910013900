"""The order in which vLLM's two model runners call a KV connector, as vLLM's own classes call it.

`KVConnectorModelRunnerMixin`, in ``vllm/v1/worker/kv_connector_model_runner_mixin.py``, makes the
calls of the first runner. `ActiveKVConnector`, in ``vllm/v1/worker/gpu/kv_connector.py``, makes
those of the second one. Both import on a CPU. The runners themselves need a GPU, so this module
plays what they do around those classes:

* the first: ``vllm/v1/worker/gpu_model_runner.py``, `execute_model`, `_update_states` and
  `sample_tokens`;
* the second: ``vllm/v1/worker/gpu/model_runner.py``, `execute_model`, `update_requests` and
  `sample_tokens`.

A step of a rank is a generator. It yields a `Stage` where the runner does work of its own, and
returns the report of the connector.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal, Protocol

import pytest

pytest.importorskip("vllm")

Stage = Literal["update", "prepare", "forward", "sample", "keep", "draft"]
"""What a runner does:

* update: zero new blocks, and copy the blocks of hits that end inside a block;
* prepare: move states to the block in which they run on;
* forward: the layers of the model;
* sample: sample tokens, and start to copy them to the host;
* keep: copy states that drafted tokens passed to the block that ends there;
* draft: the layers of the drafter.
"""

STAGES: Final[tuple[Stage, ...]] = ("update", "prepare", "forward", "sample", "keep", "draft")

Steps = Generator[Stage, None, Any]


@dataclass(frozen=True)
class SecondRunner:
    """How vLLM's second model runner calls `ActiveKVConnector`, where versions differ.

    Attributes:
        batch: how `pre_forward` gets the batch: not at all, in keywords, or as an input batch.
        finishes: whether `finish_forward` follows the forward pass.
        defers: whether a step that drafts reports before its drafter runs, and starts its stores
            after that. Without a drafter the stores then start before states are kept.
    """

    batch: Literal["none", "keywords", "input batch"]
    finishes: bool
    defers: bool


SECOND_RUNNERS: Final = {
    (0, 28): SecondRunner("none", finishes=False, defers=False),
    (0, 30): SecondRunner("keywords", finishes=True, defers=False),
    (0, 32): SecondRunner("input batch", finishes=True, defers=False),
    (0, 33): SecondRunner("input batch", finishes=True, defers=True),
}
"""By the first minor version. The first runner is the same in all versions."""


def second_runner_of(version: str) -> SecondRunner:
    """Return how the second runner of a version of vLLM calls; of a source build, as the newest."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    minor = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    known = [since for since in SECOND_RUNNERS if since <= minor]
    return SECOND_RUNNERS[max(known or SECOND_RUNNERS)]


@dataclass(frozen=True)
class Batch:
    """What a runner passes to a forward pass. `mode`: the name of its `CUDAGraphMode`."""

    requests: list[str]
    tokens: int
    mode: str

    @property
    def replays_graph(self) -> bool:
        """Whether the pass is the replay of one graph, in which no layer calls the connector."""
        return self.mode == "FULL"


class ConnectedRank(Protocol):
    """A rank with a connector.

    Attributes:
        config: vLLM's.
        connector: the worker's.
        active: vLLM's caller of the second runner; ``None`` with the first one.
        drafts: whether the engine drafts tokens.
        is_last: whether the rank is in the last pipeline stage, which samples and drafts.
    """

    config: Any
    connector: Any
    active: Any
    drafts: bool
    is_last: bool


def unconnected_step(output: Any) -> Steps:
    """Play a step of a rank without a connector."""
    yield from STAGES if output.total_num_scheduled_tokens else STAGES[:1]


def first_runner_step(rank: ConnectedRank, output: Any, batch: Batch) -> Steps:
    """Play a step of a rank under vLLM's first model runner.

    A rank that does not sample never calls `finalize_kv_connector`, so it defers the stores of an
    engine that drafts, and does not start them.
    """
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

    rank.connector.handle_preemptions(output.kv_connector_metadata)
    yield "update"
    if not output.total_num_scheduled_tokens:
        reported = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, rank.config)
        return reported.kv_connector_output
    yield "prepare"
    report = KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(
        output, defer_finalize=rank.drafts
    )
    with _forward_context(rank, batch), report as kv_connector_output:
        yield "forward"
    yield "sample"
    yield "keep"
    yield "draft"
    if rank.drafts and rank.is_last:
        KVConnectorModelRunnerMixin.finalize_kv_connector()
    return kv_connector_output


def second_runner_step(rank: ConnectedRank, output: Any, batch: Batch) -> Steps:
    """Play a step of a rank under vLLM's second model runner."""
    import vllm

    calls, active, finished = (
        second_runner_of(vllm.__version__),
        rank.active,
        output.finished_req_ids,
    )
    yield "update"
    if not output.total_num_scheduled_tokens:
        return active.no_forward(output).kv_connector_output
    yield "prepare"
    arguments = _pre_forward_arguments(calls, batch)
    if batch.replays_graph:
        if calls.batch != "none":
            arguments["attn_metadata"] = {}
        active.pre_forward(output, **arguments)
        yield "forward"
    else:
        with _forward_context(rank, batch):
            active.pre_forward(output, **arguments)
            yield "forward"
    if calls.finishes:
        active.finish_forward()
    yield "sample"
    report = None
    if rank.is_last and calls.defers:
        report = active.post_forward(finished, defer_finalize=rank.drafts)
    yield "keep"
    if not rank.is_last:
        report = active.post_forward(finished)
    yield "draft"
    if not rank.is_last:
        return report
    if not calls.defers:
        return active.post_forward(finished)
    if rank.drafts:
        active.finalize_step()
    return report


def _forward_context(rank: ConnectedRank, batch: Batch) -> Any:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context

    return set_forward_context(
        {},
        rank.config,
        num_tokens=batch.tokens,
        cudagraph_runtime_mode=CUDAGraphMode[batch.mode],
    )


def _pre_forward_arguments(calls: SecondRunner, batch: Batch) -> dict[str, Any]:
    indices = list(range(len(batch.requests)))
    if calls.batch == "keywords":
        return {
            "request_state_indices": indices,
            "request_ids": batch.requests,
            "num_tokens": batch.tokens,
        }
    if calls.batch == "input batch":
        return {
            "input_batch": SimpleNamespace(
                idx_mapping=indices, req_ids=batch.requests, num_tokens=batch.tokens
            )
        }
    return {}
