"""With the `l1-redis` profile, engines share blocks through a server until it is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from tests.e2e.conftest import RunEngine
from tests.support import redis_servers
from tests.support.engine import lower_tier
from tests.support.engine.engine import BLOCK, Engine
from tests.support.engine.lower_tier import PROMPTS
from tests.support.engine.process import EngineRun, startup
from tests.support.redis_servers import Server

pytestmark = pytest.mark.engine


def complete_as_other_users(engine: Engine) -> dict[str, list[int]]:
    """Return the cached tokens of a stored prompt, twice, for requests with a salt or a LoRA."""
    requests: dict[str, dict[str, str | None]] = {
        "salt": {"salt": "mine"},
        "lora": {"lora": os.environ["ADAPTER"]},
        "neither": {},
    }
    cached: dict[str, list[int]] = {name: [] for name in requests}
    for _ in range(2):
        engine.reset_own_cache()
        engine.stack.front.clear()
        for name, request in requests.items():
            cached[name].append(engine.complete(PROMPTS[0], tokens=2, **request)["cached"])
        assert engine.stack.flush(60)
    return cached


def complete_once(engine: Engine) -> int:
    """Return the cached tokens of a prompt that engines with other settings have stored."""
    return int(engine.complete(PROMPTS[0], tokens=2)["cached"])


def complete_beside_another_engine(engine: Engine) -> dict[str, Any]:
    """Complete prompts at the same time as another engine, then again from the stored blocks."""
    import redis

    with redis.Redis.from_url(os.environ["KVCACHE__REDIS__URL"]) as place:
        wait_for_both(place, "begin")
        first, counts = lower_tier.complete_prompts(engine), lower_tier.lower_tier_counts(engine)
        wait_for_both(place, "stored")
    engine.stack.front.clear()
    return {"first": first, "again": lower_tier.repeat_prompts(engine), **counts}


def wait_for_both(place: Any, name: str) -> None:
    """Wait until the other engine has called this too."""
    if place.incr(name) == 2:
        place.rpush(f"{name} go", 1, 1)
    assert place.blpop(f"{name} go", timeout=120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def settings_for(server: Server, **environment: str) -> dict[str, Any]:
    """Return the settings of an engine that uses ``server``."""
    return {
        "blocks": 100,
        "l1": "16MiB",
        "environment": {
            "KVCACHE_PROFILE": "l1-redis",
            "KVCACHE__REDIS__URL": server.url,
            "KVCACHE__REDIS__DEADLINE_S": "30",  # the test is about contents, not speed
            "KVCACHE__REDIS__TIMEOUT_S": "30",
            "KVCACHE__REDIS__IF_SLOWER": "load",
            **environment,
        },
    }


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint, with weights that a fixture replaces."""
    return Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def first(server: Server, run_engine: RunEngine, model: Path) -> EngineRun:
    return run_engine(
        (lower_tier.complete_prompts, lower_tier.lower_tier_counts),
        **settings_for(server),
        checkpoint=str(model),
    )


@pytest.fixture(scope="module")
def others_at_the_server(
    first: EngineRun,
    server: Server,
    run_engine: RunEngine,
    model: Path,
) -> list[EngineRun]:
    """Engines with the same server that differ from the first in dtype, block size or weights."""
    from safetensors.torch import load_file, save_file

    differences: list[dict[str, Any]] = [
        {"options": {"dtype": "float32"}},
        {"options": {"block_size": 2 * BLOCK}},
        {"checkpoint": str(model)},
    ]
    weights = load_file(model / "model.safetensors")
    trained = {name: tensor * 1.01 for name, tensor in weights.items()}
    save_file(trained, model / "model.safetensors", metadata={"format": "pt"})
    return [run_engine((complete_once,), **settings_for(server), **other) for other in differences]


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
def second(
    first: EngineRun,
    others_at_the_server: list[EngineRun],
    server: Server,
    run_engine: RunEngine,
    adapter: Path,
) -> EngineRun:
    """An engine like the first, which runs after it and kills the server at the end."""
    scenarios = (
        lower_tier.repeat_prompts,
        lower_tier.lower_tier_counts,
        lower_tier.abort_during_promotion,
        complete_as_other_users,
        lower_tier.repeat_prompts_without_servers,
    )
    settings = settings_for(server, SERVER_PIDS=str(server.pid), ADAPTER=str(adapter))
    return run_engine(scenarios, **settings, options={"enable_lora": True, "max_lora_rank": 8})


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine) -> EngineRun:
    return run_engine((lower_tier.complete_prompts, lower_tier.repeat_prompts), blocks=1000)


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


def test_salt_and_lora_share_no_blocks_with_other_requests(second: EngineRun) -> None:
    found = second.result_of(complete_as_other_users)
    assert found["neither"][0] > 0
    assert found == {name: [0, found["neither"][0]] for name in ("salt", "lora")} | {
        "neither": 2 * [found["neither"][0]]
    }


def test_engine_with_other_weights_dtype_or_block_size_finds_nothing(
    others_at_the_server: list[EngineRun],
) -> None:
    assert [other.result_of(complete_once) for other in others_at_the_server] == [0, 0, 0]


def test_abort_during_promotion_leaves_no_open_state(second: EngineRun) -> None:
    found = second.result_of(lower_tier.abort_during_promotion)
    assert not any(found["ends"].values()), found["ends"]
    assert found["cached"] > 0


def test_killed_server_makes_the_engine_compute(second: EngineRun, reference: EngineRun) -> None:
    found = second.result_of(lower_tier.repeat_prompts_without_servers, warned=True)
    assert len(found["answers"]) == len(PROMPTS)
    expected = reference.result_of(lower_tier.repeat_prompts)
    assert lower_tier.tokens_of(found["answers"]) == lower_tier.tokens_of(expected)
    assert not any(found["ends"].values()), found["ends"]


def test_engines_that_store_the_same_blocks_keep_one_copy(
    tmp_path: Path, run_engine: RunEngine, reference: EngineRun
) -> None:
    with (
        redis_servers.server(tmp_path) as server,
        ThreadPoolExecutor(2) as threads,
    ):
        settings = settings_for(server)
        plays = list(
            threads.map(
                lambda _: run_engine((complete_beside_another_engine,), **settings), range(2)
            )
        )
        names = list(server.client().scan_iter("kvcache:1:*"))
        kept = sum(not name.startswith(b"kvcache:1:about:") for name in names)
    found = [play.result_of(complete_beside_another_engine) for play in plays]
    # An engine that finds blocks of the other computes the rest in other shapes than alone.
    right = [answer["tokens"][0] for answer in reference.result_of(lower_tier.complete_prompts)]
    assert [[answer["tokens"][0] for answer in each["first"]] for each in found] == 2 * [right]
    assert found[0]["again"] == found[1]["again"]
    assert all(answer["cached"] > 0 for answer in found[0]["again"])
    assert [(each["dropped"], each["errors"], each["pinned"]) for each in found] == 2 * [(0, 0, 0)]
    blocks = {
        tuple(asked[: end + BLOCK])
        for each in found
        for asked, answer in zip(PROMPTS, each["first"], strict=True)
        for asked in [[*asked, *answer["tokens"][:-1]]]  # vLLM never computes the last token
        for end in range(0, len(asked) - BLOCK + 1, BLOCK)
    }
    assert kept == len(blocks)
