"""The `l1-disk` profile: what one engine computed, the next serves, with the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcache.profiles import load_profile
from tests.e2e.conftest import Stage
from tests.support.engine import lower_tier
from tests.support.engine.engine import BLOCK
from tests.support.engine.killing_disk import LAST
from tests.support.engine.process import Play, starts

pytestmark = pytest.mark.engine

ACTS = (
    lower_tier.ask_again,
    lower_tier.counts,
    lower_tier.abort_while_it_waits,
    lower_tier.after_reset,
)


SMALL: dict[str, Any] = {"blocks": 100, "l1": "16MiB"}


def on_disk(folder: Path) -> dict[str, str]:
    return {
        "KVCACHE_PROFILE": "l1-disk",
        "KVCACHE__DISK__PATH": str(folder / "kv"),
        "KVCACHE__DISK__CAPACITY": "64MiB",
        "KVCACHE__DISK__DEADLINE_S": "30",
        "KVCACHE__DISK__IF_SLOWER": "load",  # what is tested is what comes, not how fast
    }


@pytest.fixture(scope="module", params=["none", "zstd"])
def lives(
    request: pytest.FixtureRequest, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Play, Play]:
    """Two engines, one after another, on one directory."""
    environment = on_disk(tmp_path_factory.mktemp("disk")) | {"KVCACHE__DISK__CODEC": request.param}
    first = stage((lower_tier.ask_first, lower_tier.counts), environment=environment, **SMALL)
    return first, stage(ACTS, environment=environment, **SMALL)


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage((lower_tier.ask_first, lower_tier.ask_again), blocks=1000)


def test_the_next_engine_serves_what_the_first_computed(
    lives: tuple[Play, Play], reference: Play
) -> None:
    first, second = lives
    first.of(starts)
    assert first.of(lower_tier.ask_first) == reference.of(lower_tier.ask_first)
    wrote = first.of(lower_tier.counts)
    assert wrote["stored"] > 0
    assert (wrote["dropped"], wrote["errors"], wrote["pinned"]) == (0, 0, 0)
    second.of(starts)
    assert second.of(lower_tier.ask_again) == reference.of(lower_tier.ask_again)
    read = second.of(lower_tier.counts)
    assert read["loaded"] > 0
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(
    lives: tuple[Play, Play], reference: Play
) -> None:
    found = lives[1].of(lower_tier.abort_while_it_waits)
    assert not any(found["ends"].values()), found["ends"]
    [again, *_] = reference.of(lower_tier.ask_again)
    assert found["tokens"] == again["tokens"]
    assert found["cached"] >= 4 * BLOCK


def test_a_reset_reaches_below(lives: tuple[Play, Play]) -> None:
    assert lives[1].of(lower_tier.after_reset) == [0]


def test_files_are_where_the_profile_says(tmp_path: Path, stage: Stage) -> None:
    """A directory that cannot be used is one error at start, which names it."""
    (tmp_path / "file").write_text("")
    environment = {
        "KVCACHE_PROFILE": "l1-disk",
        "KVCACHE__DISK__PATH": str(tmp_path / "file" / "kv"),
        "KVCACHE__DISK__CAPACITY": "64MiB",
    }
    with pytest.raises(AssertionError, match="which cannot be used"):
        stage((), blocks=100, l1="16MiB", environment=environment).of(starts)


@pytest.fixture(scope="module")
def killed(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Play, Play]:
    """An engine whose core is killed while it writes to disk, its worker apart; and the next."""
    folder = tmp_path_factory.mktemp("killed")
    shipped = load_profile("l1-disk").path.read_text()
    deadly = shipped.replace(
        'kind = "disk"', 'kind = "tests.support.engine.killing_disk:DeadlyDisk"'
    )
    assert deadly != shipped
    (folder / "deadly.toml").write_text(deadly)
    its = {"KVCACHE_PROFILE": f"{folder}/deadly.toml", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    first = stage(
        (lower_tier.ask_until_it_dies,),
        environment=on_disk(folder) | its,
        options={"distributed_executor_backend": "mp"},
        **SMALL,
    )
    acts = (lower_tier.ask_first, lower_tier.ask_again, lower_tier.counts)
    return first, stage(acts, environment=on_disk(folder), **SMALL)


def test_what_was_written_before_a_kill_is_served_after_it(
    killed: tuple[Play, Play], reference: Play
) -> None:
    first, second = killed
    assert first.of(lower_tier.ask_until_it_dies) == [True, True]  # its core and its worker
    second.of(starts)
    found, right = second.of(lower_tier.ask_first), reference.of(lower_tier.ask_first)
    assert [answer["tokens"] for answer in found] == [answer["tokens"] for answer in right]
    assert found[0]["cached"] > 0
    assert second.of(lower_tier.ask_again) == reference.of(lower_tier.ask_again)
    read = second.of(lower_tier.counts)
    assert 0 < read["loaded"] < LAST
    # Were the block found whose write was not finished, its frame would be rejected: a miss.
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)
