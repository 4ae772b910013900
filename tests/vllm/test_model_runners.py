"""Walks under each of vLLM's model runners find faults in the order of copies and passes.

vLLM's own classes call the connector (`model_runners`), on a device that does its work in any legal
order. Each fault breaks a rule of `transfer/device.py`, `worker/side.py` or `scheduler/side.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm

from kvcache.connectors.jobs import Jobs
from kvcache.connectors.suspects import SuspectBlocks
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.connectors.vllm import KVCacheConnector, connector
from kvcache.connectors.vllm.messages import Step
from kvcache.connectors.vllm.worker.side import WorkerSide
from tests.support import played_ranks
from tests.support.group_hooks import needs_group_hooks
from tests.support.groups_walk import prepare_walk, walk
from tests.support.model_runners import second_runner_of
from tests.support.played_memory import WrongKVError
from tests.support.played_models import MODELS, PlayedModel
from tests.support.played_ranks import Copying
from tests.support.played_scheduler import write_config
from tests.support.reordering_device import ReorderedEvent, ReorderedStream

pytestmark = pytest.mark.engine

SECOND = second_runner_of(vllm.__version__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_walk(monkeypatch)


def test_calls_of_the_second_runner_are_those_of_the_installed_vllm() -> None:
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

    before = inspect.signature(ActiveKVConnector.pre_forward).parameters
    after = inspect.signature(ActiveKVConnector.post_forward).parameters
    batch = {"kwargs": "keywords", "input_batch": "input batch"}
    assert SECOND.batch == next((batch[name] for name in before if name in batch), "none")
    assert SECOND.finishes == hasattr(ActiveKVConnector, "finish_forward")
    assert SECOND.defers == ("defer_finalize" in after)


# Faults of the connector, of its copier and of its scheduler's side


def fence_no_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WorkerSide, "fence", lambda worker, step: None)


def copy_without_waiting_for_the_engine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReorderedStream, "wait_for", lambda stream, event: None)


def store_before_the_pass(patch: pytest.MonkeyPatch) -> None:
    fence, store = WorkerSide.fence, WorkerSide.store

    def fence_and_store(worker: WorkerSide, step: Step) -> None:
        fence(worker, step)
        store(worker, step)

    patch.setattr(WorkerSide, "fence", fence_and_store)
    patch.setattr(WorkerSide, "store", lambda worker, step: None)


def store_before_the_drafter(patch: pytest.MonkeyPatch) -> None:
    """Start the stores where vLLM asks for the failed loads of the step."""
    failed_blocks = KVCacheConnector.get_block_ids_with_load_errors
    store = KVCacheConnector.wait_for_save

    def store_first(connector: KVCacheConnector) -> set[int]:
        store(connector)
        return failed_blocks(connector)

    patch.setattr(KVCacheConnector, "get_block_ids_with_load_errors", store_first)
    patch.setattr(KVCacheConnector, "wait_for_save", lambda connector: None)


def let_stores_read_beside_the_next_step(patch: pytest.MonkeyPatch) -> None:
    """Have the workers not know that vLLM zeroes new blocks."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    class ConfigWithoutZeroing(KVCacheConfig):  # type: ignore[misc]
        needs_kv_cache_zeroing = False

    config_of = played_ranks.worker_cache_config

    def config_without_zeroing(*arguments: Any) -> Any:
        config = config_of(*arguments)
        return ConfigWithoutZeroing(config.num_blocks, [], config.kv_cache_groups)

    patch.setattr(played_ranks, "worker_cache_config", config_without_zeroing)


def acknowledge_copies_at_their_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReorderedEvent, "done", lambda event: True)
    patch.setattr(ReorderedEvent, "seconds_since", lambda event, earlier: 0.0)


def wait_for_no_layer(patch: pytest.MonkeyPatch) -> None:
    wait = DeviceCopier.wait_for_layer

    def wait_for_all(copier: DeviceCopier, layer: int | None = None) -> None:
        if layer is None:
            wait(copier)

    patch.setattr(DeviceCopier, "wait_for_layer", wait_for_all)


def expect_waits_in_every_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(connector, "pass_mode", lambda context: "NONE")


def publish_stores_after_a_failed_load(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Jobs, "fail_stores", lambda jobs: None)


def forget_what_depends_on_a_failed_load(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SuspectBlocks, "load_failed", lambda suspects, blocks, requests: None)


def publish_what_was_computed_before_a_reset(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SuspectBlocks, "reset", lambda suspects, request: None)


Fault = Callable[[pytest.MonkeyPatch], None]

DEVICE = Copying(pace=1)
FAILING_DEVICE = Copying(pace=1, failing=0.4)


@dataclass(frozen=True)
class Case:
    """A fault, and where walks find it.

    Attributes:
        runners: under which of vLLM's model runners, first or second.
    """

    fault: Fault
    model: PlayedModel = MODELS["full"]
    copying: Copying = DEVICE
    runners: tuple[str, ...] = ("first", "second")


CASES = [
    Case(fence_no_block),
    Case(fence_no_block, MODELS["full+window"]),
    Case(copy_without_waiting_for_the_engine),
    Case(store_before_the_pass),
    Case(store_before_the_drafter, MODELS["drafter layers+states"], runners=("first",)),
    Case(store_before_the_drafter, MODELS["drafter layers"], runners=("second",) * SECOND.defers),
    Case(let_stores_read_beside_the_next_step, MODELS["full+3 states"], runners=("second",)),
    Case(acknowledge_copies_at_their_start),
    Case(wait_for_no_layer),
    Case(expect_waits_in_every_pass),
    Case(publish_stores_after_a_failed_load, copying=FAILING_DEVICE),
    Case(forget_what_depends_on_a_failed_load, copying=FAILING_DEVICE),
    Case(publish_what_was_computed_before_a_reset),
]


@pytest.mark.parametrize(
    ("case", "runner"),
    [
        pytest.param(
            case,
            runner,
            id=f"{case.fault.__name__}-{len(case.model.groups)} groups-{runner}",
            marks=needs_group_hooks if len(case.model.groups) > 1 else (),
        )
        for case in CASES
        for runner in case.runners
    ],
)
def test_walk_with_a_fault_fails(
    case: Case, runner: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.fault(monkeypatch)
    with pytest.raises(WrongKVError, match="wrong"):
        _walk_often(case, folder, second_runner=runner == "second")


def _walk_often(case: Case, folder: Path, *, second_runner: bool) -> None:
    for seed in range(30):
        walk(
            case.model,
            folder,
            seed,
            second_runner=second_runner,
            is_ahead=True,
            copying=case.copying,
        )
