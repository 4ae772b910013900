"""With the `l1-disk` profile, an engine serves what the engine before it has computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcache.profiles import load_profile
from tests.e2e.conftest import RunEngine
from tests.support.engine import lower_tier
from tests.support.engine.engine import BLOCK
from tests.support.engine.killing_disk import LAST
from tests.support.engine.process import EngineRun, startup

pytestmark = pytest.mark.engine

SCENARIOS = (
    lower_tier.repeat_prompts,
    lower_tier.lower_tier_counts,
    lower_tier.abort_during_promotion,
    lower_tier.cached_after_reset,
)


SMALL: dict[str, Any] = {"blocks": 100, "l1": "16MiB"}


def on_disk(folder: Path) -> dict[str, str]:
    return {
        "KVCACHE_PROFILE": "l1-disk",
        "KVCACHE__DISK__PATH": str(folder / "kv"),
        "KVCACHE__DISK__CAPACITY": "64MiB",
        "KVCACHE__DISK__DEADLINE_S": "30",
        "KVCACHE__DISK__IF_SLOWER": "load",  # the test is about contents, not speed
    }


@pytest.fixture(scope="module", params=["none", "zstd"])
def engines(
    request: pytest.FixtureRequest, run_engine: RunEngine, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineRun, EngineRun]:
    """Two engines run one after the other on one directory."""
    environment = on_disk(tmp_path_factory.mktemp("disk")) | {"KVCACHE__DISK__CODEC": request.param}
    first = run_engine(
        (lower_tier.complete_prompts, lower_tier.lower_tier_counts),
        environment=environment,
        **SMALL,
    )
    return first, run_engine(SCENARIOS, environment=environment, **SMALL)


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine) -> EngineRun:
    return run_engine((lower_tier.complete_prompts, lower_tier.repeat_prompts), blocks=1000)


def test_restart_on_the_same_directory_serves_blocks_of_the_engine_before(
    engines: tuple[EngineRun, EngineRun], reference: EngineRun
) -> None:
    first, second = engines
    first.result_of(startup)
    assert first.result_of(lower_tier.complete_prompts) == reference.result_of(
        lower_tier.complete_prompts
    )
    wrote = first.result_of(lower_tier.lower_tier_counts)
    assert wrote["stored"] > 0
    assert (wrote["dropped"], wrote["errors"], wrote["pinned"]) == (0, 0, 0)
    second.result_of(startup)
    assert second.result_of(lower_tier.repeat_prompts) == reference.result_of(
        lower_tier.repeat_prompts
    )
    read = second.result_of(lower_tier.lower_tier_counts)
    assert read["loaded"] > 0
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)


def test_abort_during_promotion_leaves_no_open_state(
    engines: tuple[EngineRun, EngineRun], reference: EngineRun
) -> None:
    found = engines[1].result_of(lower_tier.abort_during_promotion)
    assert not any(found["ends"].values()), found["ends"]
    [again, *_] = reference.result_of(lower_tier.repeat_prompts)
    assert found["tokens"] == again["tokens"]
    assert found["cached"] >= 4 * BLOCK


def test_reset_empties_the_lower_tier(engines: tuple[EngineRun, EngineRun]) -> None:
    assert engines[1].result_of(lower_tier.cached_after_reset) == [0]


def test_start_with_an_unusable_path_fails_with_its_name(
    tmp_path: Path, run_engine: RunEngine
) -> None:
    """An unusable directory is one error at start that names it."""
    (tmp_path / "file").write_text("")
    environment = {
        "KVCACHE_PROFILE": "l1-disk",
        "KVCACHE__DISK__PATH": str(tmp_path / "file" / "kv"),
        "KVCACHE__DISK__CAPACITY": "64MiB",
    }
    with pytest.raises(AssertionError, match="which cannot be used"):
        run_engine((), blocks=100, l1="16MiB", environment=environment).result_of(startup)


@pytest.fixture(scope="module")
def killed_and_next(
    run_engine: RunEngine, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineRun, EngineRun]:
    """An engine that is killed while its core writes to disk, and the engine after it."""
    folder = tmp_path_factory.mktemp("killed")
    shipped = load_profile("l1-disk").path.read_text()
    killing = shipped.replace(
        'kind = "disk"', 'kind = "tests.support.engine.killing_disk:KillingDisk"'
    )
    assert killing != shipped
    (folder / "killing.toml").write_text(killing)
    settings = {"KVCACHE_PROFILE": f"{folder}/killing.toml", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    first = run_engine(
        (lower_tier.complete_until_killed,),
        environment=on_disk(folder) | settings,
        options={"distributed_executor_backend": "mp"},
        **SMALL,
    )
    acts = (lower_tier.complete_prompts, lower_tier.repeat_prompts, lower_tier.lower_tier_counts)
    return first, run_engine(acts, environment=on_disk(folder), **SMALL)


def test_restart_after_a_kill_serves_blocks_written_before_it(
    killed_and_next: tuple[EngineRun, EngineRun], reference: EngineRun
) -> None:
    first, second = killed_and_next
    assert first.result_of(lower_tier.complete_until_killed) == [
        True,
        True,
    ]  # the core and the worker have ended
    second.result_of(startup)
    found, right = (
        second.result_of(lower_tier.complete_prompts),
        reference.result_of(lower_tier.complete_prompts),
    )
    assert [answer["tokens"] for answer in found] == [answer["tokens"] for answer in right]
    assert found[0]["cached"] > 0
    assert second.result_of(lower_tier.repeat_prompts) == reference.result_of(
        lower_tier.repeat_prompts
    )
    read = second.result_of(lower_tier.lower_tier_counts)
    assert 0 < read["loaded"] < LAST
    # A lookup that found the half-written block would reject its frame and count a miss.
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)
