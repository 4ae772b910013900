"""The `l1-redis` profile: engines at one server, and what the second answers when it is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("redis")

from tests.e2e import below
from tests.e2e.below import PROMPTS
from tests.e2e.conftest import Stage
from tests.e2e.engine import Answer, Engine, Play, starts
from tests.tiers import servers
from tests.tiers.servers import Server

pytestmark = pytest.mark.engine


def without_the_server(engine: Engine) -> dict[str, Any]:
    """The same prompts again when the server was killed and L1 is empty."""
    os.kill(int(os.environ["SERVER_PID"]), signal.SIGKILL)
    engine.side._stack.front.clear()
    return {"answers": below.ask_again(engine), "ends": engine.open_ends()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def lives(server: Server, stage: Stage) -> tuple[Play, Play]:
    """Two engines, each with its own L1, at one server."""
    environment = {
        "KVCACHE_PROFILE": "l1-redis",
        "KVCACHE__REDIS__URL": server.url,
        "KVCACHE__REDIS__DEADLINE_S": "30",  # what is tested is what comes, not how fast
        "KVCACHE__REDIS__TIMEOUT_S": "30",
        "SERVER_PID": str(server.pid),
    }
    options: dict[str, Any] = {"blocks": 100, "l1": "16MiB", "environment": environment}
    first = stage((below.ask_first, below.counts), **options)
    acts = (below.ask_again, below.counts, below.abort_while_it_waits, without_the_server)
    return first, stage(acts, **options)


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage((below.ask_first, below.ask_again), blocks=1000)


def test_the_second_engine_serves_what_only_the_first_has_seen(
    lives: tuple[Play, Play], reference: Play
) -> None:
    first, second = lives
    first.of(starts)
    assert first.of(below.ask_first) == reference.of(below.ask_first)
    wrote = first.of(below.counts)
    assert wrote["stored"] > 0
    assert (wrote["dropped"], wrote["errors"], wrote["pinned"]) == (0, 0, 0)
    second.of(starts)
    answers = second.of(below.ask_again)
    assert answers == reference.of(below.ask_again)
    assert all(answer["cached"] > 0 for answer in answers)
    read = second.of(below.counts)
    assert read["loaded"] > 0
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(lives: tuple[Play, Play]) -> None:
    found = lives[1].of(below.abort_while_it_waits)
    assert not any(found["ends"].values()), found["ends"]
    assert found["cached"] > 0


def test_without_the_server_everything_is_computed(
    lives: tuple[Play, Play], reference: Play
) -> None:
    found = lives[1].of(without_the_server, warned=True)

    def said(answers: list[Answer]) -> list[Any]:
        return [answer["tokens"] for answer in answers]

    assert len(found["answers"]) == len(PROMPTS)
    assert said(found["answers"]) == said(reference.of(below.ask_again))
    assert not any(found["ends"].values()), found["ends"]
