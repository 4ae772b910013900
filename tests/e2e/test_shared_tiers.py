"""Engines share blocks through an object store and through a Mooncake pool, until it is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine
from tests.support import mooncake_pool, s3_server
from tests.support.engine import lower_tier
from tests.support.engine.process import EngineRun, startup

pytestmark = pytest.mark.engine


@dataclass(frozen=True, slots=True)
class SharedPlace:
    """Where engines share blocks: the variables of an engine, and the processes behind it."""

    variables: dict[str, str]
    pids: list[int]


@contextmanager
def object_store(folder: Path) -> Iterator[SharedPlace]:
    """Start an S3 server."""
    with s3_server.server(folder) as server:
        variables = server.variables("object", "blocks") | dict(s3_server.environment())
        yield SharedPlace(variables, [server.pid])


@contextmanager
def pool(folder: Path) -> Iterator[SharedPlace]:
    """Start a Mooncake master, and a process that lends memory to its pool."""
    with mooncake_pool.pool(folder) as started:
        pids = [each.pid for each in (started.master, *started.holders)]
        yield SharedPlace(started.variables("mooncake"), pids)


PLACES: dict[str, Callable[[Path], AbstractContextManager[SharedPlace]]] = {
    "object": object_store,
    "mooncake": pool,
}


@pytest.fixture(scope="module", params=PLACES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def place(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedPlace]:
    with PLACES[kind](tmp_path_factory.mktemp(kind)) as place:
        yield place


@pytest.fixture(scope="module")
def settings(kind: str, place: SharedPlace) -> dict[str, Any]:
    """The settings of both engines."""
    tier = f"KVCACHE__{kind.upper()}"
    return {
        "blocks": 100,
        "l1": "16MiB",
        "environment": {
            "KVCACHE_PROFILE": f"l1-{kind}",
            f"{tier}__DEADLINE_S": "30",  # the test is about contents, not speed
            f"{tier}__TIMEOUT_S": "30",
            f"{tier}__IF_SLOWER": "load",
            "SERVER_PIDS": " ".join(map(str, place.pids)),
            **place.variables,
        },
    }


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine) -> EngineRun:
    """An engine without kvcache that has room for every block."""
    return run_engine((lower_tier.complete_prompts, lower_tier.repeat_prompts), blocks=1000)


@pytest.fixture(scope="module")
def first(settings: dict[str, Any], run_engine: RunEngine) -> EngineRun:
    return run_engine((lower_tier.complete_prompts, lower_tier.lower_tier_counts), **settings)


@pytest.fixture(scope="module")
def second(first: EngineRun, settings: dict[str, Any], run_engine: RunEngine) -> EngineRun:
    """An engine like the first, which runs after it and kills the servers at the end."""
    scenarios = (
        lower_tier.repeat_prompts,
        lower_tier.lower_tier_counts,
        lower_tier.repeat_prompts_without_servers,
    )
    return run_engine(scenarios, **settings)


def test_second_engine_serves_blocks_of_the_first(
    first: EngineRun, second: EngineRun, reference: EngineRun
) -> None:
    first.result_of(startup)
    assert first.result_of(lower_tier.complete_prompts) == reference.result_of(
        lower_tier.complete_prompts
    )
    wrote = first.result_of(lower_tier.lower_tier_counts)
    assert wrote["stored"] > 0
    assert (wrote["dropped"], wrote["errors"], wrote["pinned"]) == (0, 0, 0)
    second.result_of(startup)
    answers = second.result_of(lower_tier.repeat_prompts)
    assert answers == reference.result_of(lower_tier.repeat_prompts)
    assert all(answer["cached"] > 0 for answer in answers)
    read = second.result_of(lower_tier.lower_tier_counts)
    assert read["loaded"] > 0
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)


def test_killed_servers_make_the_engine_compute(second: EngineRun, reference: EngineRun) -> None:
    found = second.result_of(lower_tier.repeat_prompts_without_servers, warned=True)
    expected = reference.result_of(lower_tier.repeat_prompts)
    assert lower_tier.tokens_of(found["answers"]) == lower_tier.tokens_of(expected)
    assert not any(found["ends"].values()), found["ends"]
