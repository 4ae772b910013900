"""Models with several KV cache groups and a lower tier: disk, Redis, and one that hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import HybridCheckpoint, RunEngine
from tests.support import redis_servers
from tests.support.engine import hanging_tier, lower_tier, several_groups
from tests.support.engine.comparison import assert_close, assert_equal, assert_no_open_state
from tests.support.engine.hybrid_models import LARGE, MODELS
from tests.support.engine.process import EngineRun, startup
from tests.support.group_hooks import needs_tensor_shards

# Without them, vLLM does not run some of these models in float32 on a CPU.
pytestmark = [pytest.mark.engine, needs_tensor_shards]

HANGING = """
[[tier]]
name = "l1"
kind = "dram"
capacity = "16MiB"

[[tier]]
name = "hanging"
kind = "tests.support.engine.hanging_tier:HangingTier"
deadline_s = 0.2
if_slower = "load"
"""


@contextmanager
def lower_tier_of(profile: str, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the variables of an engine with an empty disk or Redis server below L1."""
    # The tests are about contents, not speed.
    if profile == "l1-disk":
        yield {
            "KVCACHE_PROFILE": profile,
            "KVCACHE__DISK__PATH": str(folder / "kv"),
            "KVCACHE__DISK__CAPACITY": "64MiB",
            "KVCACHE__DISK__DEADLINE_S": "30",
            "KVCACHE__DISK__IF_SLOWER": "load",
        }
        return
    with redis_servers.server(folder) as server:
        yield {
            "KVCACHE_PROFILE": profile,
            "KVCACHE__REDIS__URL": server.url,
            "KVCACHE__REDIS__DEADLINE_S": "30",
            "KVCACHE__REDIS__TIMEOUT_S": "30",
            "KVCACHE__REDIS__IF_SLOWER": "load",
        }


@pytest.mark.parametrize(
    ("profile", "name"),
    [("l1-disk", "gpt-oss"), ("l1-disk", "lfm2"), ("l1-redis", "gemma-3"), ("l1-redis", "qwen3.5")],
)
def test_second_engine_serves_blocks_of_the_first(
    profile: str,
    name: str,
    run_engine: RunEngine,
    hybrid_checkpoint: HybridCheckpoint,
    tmp_path: Path,
) -> None:
    model = MODELS[name]
    common: dict[str, Any] = {"checkpoint": str(hybrid_checkpoint(name)), **model.options}
    with lower_tier_of(profile, tmp_path) as environment:
        small = {"blocks": model.blocks, "l1": "16MiB", "environment": environment, **common}
        first = run_engine((lower_tier.complete_prompts, lower_tier.lower_tier_counts), **small)
        second = run_engine((several_groups.repeat_prompts, lower_tier.lower_tier_counts), **small)
    reference = run_engine(
        (lower_tier.complete_prompts, several_groups.repeat_prompts), blocks=LARGE, **common
    )
    assert_equal(
        first.result_of(lower_tier.complete_prompts),
        reference.result_of(lower_tier.complete_prompts),
        model.tolerance,
    )
    wrote = first.result_of(lower_tier.lower_tier_counts)
    assert wrote["stored"] > 0
    assert (wrote["dropped"], wrote["errors"], wrote["pinned"]) == (0, 0, 0)
    second.result_of(startup)
    answers = second.result_of(several_groups.repeat_prompts)
    assert_equal(answers, reference.result_of(several_groups.repeat_prompts), model.tolerance)
    assert all(answer["cached"] > 0 for answer in answers)
    read = second.result_of(lower_tier.lower_tier_counts)
    assert 0 < read["loaded"] < wrote["stored"]
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)


@pytest.fixture
def hanging(
    run_engine: RunEngine, hybrid_checkpoint: HybridCheckpoint, tmp_path: Path
) -> EngineRun:
    profile = tmp_path / "hanging.toml"
    profile.write_text(HANGING)
    return run_engine(
        (lower_tier.complete_prompts, hanging_tier.repeat_prompts_of_a_hanging_tier),
        checkpoint=str(hybrid_checkpoint("gpt-oss")),
        blocks=MODELS["gpt-oss"].blocks,
        l1="16MiB",
        environment={"KVCACHE_PROFILE": str(profile)},
        **MODELS["gpt-oss"].options,
    )


def test_hanging_tier_makes_the_engine_compute(hanging: EngineRun) -> None:
    first = hanging.result_of(lower_tier.complete_prompts)
    facts = hanging.result_of(hanging_tier.repeat_prompts_of_a_hanging_tier)
    assert facts["answers"][0]["cached"] == 0
    assert_close(facts["answers"], first, MODELS["gpt-oss"].tolerance)
    assert_close(facts["again"], first, MODELS["gpt-oss"].tolerance)
    assert all(answer["cached"] > 0 for answer in facts["again"])
    assert_no_open_state(facts)
