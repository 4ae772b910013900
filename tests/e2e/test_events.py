"""KV events of a real engine, over its own ZMQ publisher, are what L1 and the disk hold."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine import kv_events
from tests.support.engine.process import Act, Play, starts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def published(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Play:
    folder = tmp_path_factory.mktemp("events")
    return stage(
        kv_events.ACTS,
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


def found_by(published: Play, act: Act) -> Any:
    """What an act found. The write queue of so small an L1, 8 blocks, may be full: no fault."""
    warnings = published.warnings(act)
    assert all("write queue full" in warning for warning in warnings), warnings
    return published.of(act, warned=bool(warnings))


def test_it_starts_without_a_warning(published: Play) -> None:
    published.of(starts)


def test_l1_is_known_after_every_request(published: Play) -> None:
    found = found_by(published, kv_events.l1_is_known)
    assert found["wrong"] == []
    assert found["evicted"] > 0
    assert found["held"] > 16


def test_the_disk_is_known_when_it_was_asked(published: Play) -> None:
    found = found_by(published, kv_events.the_disk_is_known)
    assert found["lost"] > 0  # 8 prompts of 9 blocks are more than it holds
    assert found["missing"] == 0
    assert found["wrong"] == []
    assert found["left"] < found["lost"]


def test_a_reset_is_known(published: Play) -> None:
    found = found_by(published, kv_events.a_reset_is_known)
    assert min(found["before"]) >= 3
    assert found["emptied"] == [0, 0]
    assert found["after"] == [3, 3]
