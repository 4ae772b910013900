"""The KV events that vLLM publishes over ZMQ match the contents of L1 and of the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine
from tests.support.engine import kv_events
from tests.support.engine.checkpoints import GPT_OSS, WINDOW, write_model
from tests.support.engine.process import EngineRun, Scenario, startup
from tests.support.group_hooks import needs_group_hooks

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def published(run_engine: RunEngine, tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    folder = tmp_path_factory.mktemp("events")
    return run_engine(
        kv_events.SCENARIOS,
        blocks=100,
        l1="1MiB",  # 32 blocks
        options={
            "kv_events_config": {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"ipc://{folder}/events",
            }
        },
        environment={
            "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "0",
            "KVCACHE_PROFILE": "l1-disk",
            "KVCACHE__DISK__PATH": str(folder / "kv"),
            "KVCACHE__DISK__CAPACITY": "2MiB",  # 56 blocks in frames
            "KVCACHE__DISK__DEADLINE_S": "30",
            "KVCACHE__DISK__IF_SLOWER": "load",
        },
    )


def result_of(published: EngineRun, scenario: Scenario) -> Any:
    """Return the result of a scenario. The write queue, 8 blocks for this L1, may be full."""
    warnings = published.warnings_of(scenario)
    assert all("write queue full" in warning for warning in warnings), warnings
    return published.result_of(scenario, warned=bool(warnings))


def test_start_with_events_logs_no_warning(published: EngineRun) -> None:
    published.result_of(startup)


def test_events_after_each_request_match_l1(published: EngineRun) -> None:
    found = result_of(published, kv_events.l1_events)
    assert found["wrong"] == []
    assert found["evicted"] > 0
    assert found["held"] > 16


def test_events_after_a_lookup_match_the_disk(published: EngineRun) -> None:
    found = result_of(published, kv_events.disk_events)
    assert found["lost"] > 0  # 8 prompts of 9 blocks are more than it holds
    assert found["missing"] == 0
    assert found["wrong"] == []
    assert found["left"] < found["lost"]


def test_events_after_a_reset_match_both_tiers(published: EngineRun) -> None:
    found = result_of(published, kv_events.reset_events)
    assert min(found["before"]) >= 3
    assert found["emptied"] == [0, 0]
    assert found["after"] == [3, 3]


@needs_group_hooks
def test_events_of_several_groups_match_l1(run_engine: RunEngine, tmp_path: Path) -> None:
    run = run_engine(
        [kv_events.events_of_groups],
        checkpoint=str(write_model(tmp_path / "gpt-oss", GPT_OSS)),
        blocks=100,
        l1="1MiB",  # 64 blocks of a group
        options={
            "kv_events_config": {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"ipc://{tmp_path}/events",
            }
        },
        environment={"VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "0"},
    )
    found = run.result_of(kv_events.events_of_groups)
    assert found["wrong"] == []
    assert sorted(kind[1:] for kind in found["kinds"]) == [
        ["full_attention", None],
        ["sliding_window", WINDOW],
    ]
    assert found["evicted"] > 0
