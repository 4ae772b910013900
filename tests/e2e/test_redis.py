"""The `l1-redis` profile: engines at one server, and what the second answers when it is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from tests.e2e.conftest import Stage
from tests.support import redis_servers
from tests.support.engine import lower_tier
from tests.support.engine.engine import BLOCK, Answer, Engine
from tests.support.engine.lower_tier import PROMPTS
from tests.support.engine.process import Play, starts
from tests.support.redis_servers import Server

pytestmark = pytest.mark.engine


def ask_as_strangers(engine: Engine) -> dict[str, list[int]]:
    """Cached tokens of a prompt that others have stored, and of it again, for other askers."""
    askers: dict[str, dict[str, str | None]] = {
        "salt": {"salt": "mine"},
        "lora": {"lora": os.environ["ADAPTER"]},
        "nobody": {},
    }
    cached: dict[str, list[int]] = {name: [] for name in askers}
    for _ in range(2):
        engine.evict_own()
        engine.side.stack.front.clear()
        for name, asker in askers.items():
            cached[name].append(engine.ask(PROMPTS[0], tokens=2, **asker)["cached"])
        assert engine.side.stack.flush(60)
    return cached


def ask_once(engine: Engine) -> int:
    """Cached tokens of a prompt that engines with other settings have stored."""
    return int(engine.ask(PROMPTS[0], tokens=2)["cached"])


def ask_with_another(engine: Engine) -> dict[str, Any]:
    """The prompts, from when another engine is there too; and again from what both have stored."""
    import redis

    with redis.Redis.from_url(os.environ["KVCACHE__REDIS__URL"]) as place:
        meet(place, "begin")
        first, counts = lower_tier.ask_first(engine), lower_tier.counts(engine)
        meet(place, "stored")
    engine.side.stack.front.clear()
    return {"first": first, "again": lower_tier.ask_again(engine), **counts}


def meet(place: Any, name: str) -> None:
    """Wait for the other engine."""
    if place.incr(name) == 2:
        place.rpush(f"{name} go", 1, 1)
    assert place.blpop(f"{name} go", timeout=120)


def without_the_server(engine: Engine) -> dict[str, Any]:
    """The same prompts again when the server was killed and L1 is empty."""
    os.kill(int(os.environ["SERVER_PID"]), signal.SIGKILL)
    engine.side.stack.front.clear()
    return {"answers": lower_tier.ask_again(engine), "ends": engine.open_ends()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def at(server: Server, **environment: str) -> dict[str, Any]:
    """The settings of an engine at ``server``."""
    return {
        "blocks": 100,
        "l1": "16MiB",
        "environment": {
            "KVCACHE_PROFILE": "l1-redis",
            "KVCACHE__REDIS__URL": server.url,
            "KVCACHE__REDIS__DEADLINE_S": "30",  # what is tested is what comes, not how fast
            "KVCACHE__REDIS__TIMEOUT_S": "30",
            "KVCACHE__REDIS__IF_SLOWER": "load",
            **environment,
        },
    }


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint, whose weights others may replace."""
    return Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def first(server: Server, stage: Stage, model: Path) -> Play:
    return stage((lower_tier.ask_first, lower_tier.counts), **at(server), checkpoint=str(model))


@pytest.fixture(scope="module")
def strangers(
    first: Play,
    server: Server,
    stage: Stage,
    model: Path,
) -> list[Play]:
    """Engines at the same server that differ from the first in one thing each.

    One is a pod that mounts another model at the same path.
    """
    from safetensors.torch import load_file, save_file

    others: list[dict[str, Any]] = [
        {"options": {"dtype": "float32"}},
        {"options": {"block_size": 2 * BLOCK}},
        {"checkpoint": str(model)},
    ]
    weights = load_file(model / "model.safetensors")
    trained = {name: tensor * 1.01 for name, tensor in weights.items()}
    save_file(trained, model / "model.safetensors", metadata={"format": "pt"})
    return [stage((ask_once,), **at(server), **other) for other in others]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the checkpoint of these tests."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("lora") / "poet"
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora"
    save_file(
        {f"{name}_A.weight": torch.ones(8, 128), f"{name}_B.weight": torch.ones(64, 8)},
        str(folder / "adapter_model.safetensors"),
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def second(first: Play, strangers: list[Play], server: Server, stage: Stage, adapter: Path) -> Play:
    """An engine like the first, after it; it kills the server in the end."""
    acts = (
        lower_tier.ask_again, lower_tier.counts, lower_tier.abort_while_it_waits, ask_as_strangers,
        without_the_server,
    )  # fmt: skip
    settings = at(server, SERVER_PID=str(server.pid), ADAPTER=str(adapter))
    return stage(acts, **settings, options={"enable_lora": True, "max_lora_rank": 8})


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage((lower_tier.ask_first, lower_tier.ask_again), blocks=1000)


def test_the_second_engine_serves_what_only_the_first_has_seen(
    first: Play, second: Play, reference: Play
) -> None:
    first.of(starts)
    assert first.of(lower_tier.ask_first) == reference.of(lower_tier.ask_first)
    wrote = first.of(lower_tier.counts)
    assert wrote["stored"] > 0
    assert (wrote["dropped"], wrote["errors"], wrote["pinned"]) == (0, 0, 0)
    second.of(starts)
    answers = second.of(lower_tier.ask_again)
    assert answers == reference.of(lower_tier.ask_again)
    assert all(answer["cached"] > 0 for answer in answers)
    read = second.of(lower_tier.counts)
    assert read["loaded"] > 0
    assert (read["missed"], read["errors"], read["pinned"]) == (0, 0, 0)


def test_another_salt_or_lora_finds_only_its_own(second: Play) -> None:
    found = second.of(ask_as_strangers)
    assert found["nobody"][0] > 0
    assert found == {name: [0, found["nobody"][0]] for name in ("salt", "lora")} | {
        "nobody": 2 * [found["nobody"][0]]
    }


def test_another_model_dtype_or_block_size_finds_nothing(strangers: list[Play]) -> None:
    assert [stranger.of(ask_once) for stranger in strangers] == [0, 0, 0]


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(second: Play) -> None:
    found = second.of(lower_tier.abort_while_it_waits)
    assert not any(found["ends"].values()), found["ends"]
    assert found["cached"] > 0


def test_without_the_server_everything_is_computed(second: Play, reference: Play) -> None:
    found = second.of(without_the_server, warned=True)

    def said(answers: list[Answer]) -> list[Any]:
        return [answer["tokens"] for answer in answers]

    assert len(found["answers"]) == len(PROMPTS)
    assert said(found["answers"]) == said(reference.of(lower_tier.ask_again))
    assert not any(found["ends"].values()), found["ends"]


def test_engines_that_write_the_same_at_once_keep_one_copy(
    tmp_path: Path, stage: Stage, reference: Play
) -> None:
    with (
        redis_servers.server(tmp_path) as server,
        ThreadPoolExecutor(2) as threads,
    ):
        settings = at(server)
        plays = list(threads.map(lambda _: stage((ask_with_another,), **settings), range(2)))
        names = list(server.client().scan_iter("kvcache:1:*"))
        kept = sum(not name.startswith(b"kvcache:1:about:") for name in names)
    found = [play.of(ask_with_another) for play in plays]
    # One may find what the other has just stored, and computes the rest in other shapes than alone.
    right = [answer["tokens"][0] for answer in reference.of(lower_tier.ask_first)]
    assert [[answer["tokens"][0] for answer in each["first"]] for each in found] == 2 * [right]
    assert found[0]["again"] == found[1]["again"]
    assert all(answer["cached"] > 0 for answer in found[0]["again"])
    assert [(each["dropped"], each["errors"], each["pinned"]) for each in found] == 2 * [(0, 0, 0)]
    blocks = {
        tuple(asked[: end + BLOCK])
        for each in found
        for asked, answer in zip(PROMPTS, each["first"], strict=True)
        for asked in [[*asked, *answer["tokens"][:-1]]]  # the last is never an input
        for end in range(0, len(asked) - BLOCK + 1, BLOCK)
    }
    assert kept == len(blocks)
