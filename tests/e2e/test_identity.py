"""Changes of weights that vLLM's block hashes do not show, on real engines with a disk.

Four engines run one after the other on one directory. The second has the model at another path and
a LoRA adapter with other weights, and resets everything at the end. The fourth has other weights at
the path of the third.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.conftest import RunEngine
from tests.e2e.test_below import on_disk
from tests.support.engine import lower_tier
from tests.support.engine.engine import BLOCK, VOCABULARY, Completion, Engine, prompt
from tests.support.engine.process import EngineRun, Scenario, startup

pytestmark = pytest.mark.engine

ADAPTED = prompt("for the adapter", 3 * BLOCK + 5)


def complete_with_adapter(engine: Engine) -> Completion:
    """Complete a prompt with the LoRA adapter."""
    answer = engine.complete(ADAPTED, lora=os.environ["ADAPTER"])
    if engine.has_kvcache:
        assert engine.stack.flush(60)
    return answer


class Engines(NamedTuple):
    first: EngineRun
    moved: EngineRun
    after_reset: EngineRun
    retrained: EngineRun
    reference: EngineRun  # the weights of `retrained`, without kvcache


def write_model(folder: Path, seed: int) -> Path:
    from kvcache.cli.demo.checkpoint import write

    return write(
        folder,
        layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256,
        vocabulary=VOCABULARY, positions=4096, seed=seed,
    )  # fmt: skip


def write_adapter(folder: Path, value: float) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora"
    tensors = {f"{name}_A.weight": torch.ones(8, 128), f"{name}_B.weight": torch.ones(64, 8)}
    save_file(
        {key: tensor * value for key, tensor in tensors.items()},
        str(folder / "adapter_model.safetensors"),
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def engines(run_engine: RunEngine, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder = tmp_path_factory.mktemp("identity")
    adapter = folder / "poet"
    settings: dict[str, Any] = {
        "blocks": 100,
        "l1": "16MiB",
        "environment": on_disk(folder) | {"ADAPTER": str(adapter)},
    }
    lora: dict[str, Any] = {"options": {"enable_lora": True, "max_lora_rank": 8}}

    old = write_model(folder / "model", seed=0)
    write_adapter(adapter, 1.0)
    acts: tuple[Scenario, ...] = (
        lower_tier.complete_prompts,
        complete_with_adapter,
        lower_tier.lower_tier_counts,
    )
    first = run_engine(acts, checkpoint=str(old), **settings, **lora)

    new = old.rename(folder / "elsewhere")
    write_adapter(adapter, -2.0)
    acts = (
        lower_tier.complete_prompts,
        complete_with_adapter,
        lower_tier.lower_tier_counts,
        lower_tier.cached_after_reset,
    )
    moved = run_engine(acts, checkpoint=str(new), **settings, **lora)

    acts = (lower_tier.complete_prompts, lower_tier.lower_tier_counts)
    after_reset = run_engine(acts, checkpoint=str(new), **settings)

    write_model(new, seed=1)
    retrained = run_engine(acts, checkpoint=str(new), **settings)
    reference = run_engine((lower_tier.complete_prompts,), checkpoint=str(new), blocks=1000)
    return Engines(first, moved, after_reset, retrained, reference)


def first_cached(answers: list[Completion]) -> int:
    """Return the cached tokens of the first prompt, which vLLM's own cache does not hold."""
    return int(answers[0]["cached"])


def tokens_of(answers: list[Completion]) -> list[Any]:
    return [answer["tokens"] for answer in answers]


def test_restart_same_files_at_another_path_finds_its_blocks(engines: Engines) -> None:
    engines.first.result_of(startup)
    engines.moved.result_of(startup)
    before, after = (
        engines.first.result_of(lower_tier.complete_prompts),
        engines.moved.result_of(lower_tier.complete_prompts),
    )
    assert (first_cached(before), tokens_of(after)) == (0, tokens_of(before))
    assert first_cached(after) >= 4 * BLOCK
    assert engines.moved.result_of(lower_tier.lower_tier_counts)["loaded"] > 0


def test_restart_adapter_replaced_under_its_name_finds_nothing_of_before(engines: Engines) -> None:
    before, after = (
        engines.first.result_of(complete_with_adapter),
        engines.moved.result_of(complete_with_adapter),
    )
    assert (before["cached"], after["cached"]) == (0, 0)
    assert after["logprobs"] != before["logprobs"]


def test_restart_after_a_reset_finds_nothing_of_before(engines: Engines) -> None:
    assert engines.moved.result_of(lower_tier.cached_after_reset) == [0]
    answers = engines.after_reset.result_of(lower_tier.complete_prompts)
    assert first_cached(answers) == 0
    assert tokens_of(answers) == tokens_of(engines.first.result_of(lower_tier.complete_prompts))
    assert (
        engines.after_reset.result_of(lower_tier.lower_tier_counts)["stored"] > 0
    )  # for the next engine


def test_restart_other_weights_at_the_same_path_find_nothing_of_before(engines: Engines) -> None:
    answers = engines.retrained.result_of(lower_tier.complete_prompts)
    assert first_cached(answers) == 0
    assert engines.retrained.result_of(lower_tier.lower_tier_counts)["loaded"] == 0
    right = engines.reference.result_of(lower_tier.complete_prompts)
    assert answers == right
    assert tokens_of(right) != tokens_of(engines.after_reset.result_of(lower_tier.complete_prompts))
