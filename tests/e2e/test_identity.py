"""What changes the bytes of a block without changing its key, on a real engine with a disk.

Four engines, one after another, on one directory: the second has the model at another path and a
LoRA adapter that was trained again, and is reset; the fourth has other weights at the third's path.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.conftest import Stage
from tests.e2e.test_below import on_disk
from tests.support.engine import lower_tier
from tests.support.engine.engine import BLOCK, VOCABULARY, Answer, Engine, prompt
from tests.support.engine.process import Act, Play, starts

pytestmark = pytest.mark.engine

ADAPTED = prompt("for the adapter", 3 * BLOCK + 5)


def ask_adapter(engine: Engine) -> Answer:
    """A prompt for the LoRA adapter."""
    answer = engine.ask(ADAPTED, lora=os.environ["ADAPTER"])
    if engine.keeps:
        assert engine.side.stack.flush(60)
    return answer


class Lives(NamedTuple):
    first: Play
    moved: Play
    after_reset: Play
    retrained: Play
    reference: Play  # of the weights of the last, with no cache but vLLM's


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
def lives(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Lives:
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
    acts: tuple[Act, ...] = (lower_tier.ask_first, ask_adapter, lower_tier.counts)
    first = stage(acts, checkpoint=str(old), **settings, **lora)

    new = old.rename(folder / "elsewhere")
    write_adapter(adapter, -2.0)
    acts = (lower_tier.ask_first, ask_adapter, lower_tier.counts, lower_tier.after_reset)
    moved = stage(acts, checkpoint=str(new), **settings, **lora)

    acts = (lower_tier.ask_first, lower_tier.counts)
    after_reset = stage(acts, checkpoint=str(new), **settings)

    write_model(new, seed=1)
    retrained = stage(acts, checkpoint=str(new), **settings)
    reference = stage((lower_tier.ask_first,), checkpoint=str(new), blocks=1000)
    return Lives(first, moved, after_reset, retrained, reference)


def heads(answers: list[Answer]) -> int:
    """Cached tokens of the first prompt, of which the engine itself has nothing."""
    return int(answers[0]["cached"])


def said(answers: list[Answer]) -> list[Any]:
    return [answer["tokens"] for answer in answers]


def test_restart_same_files_at_another_path_finds_its_blocks(lives: Lives) -> None:
    lives.first.of(starts)
    lives.moved.of(starts)
    before, after = lives.first.of(lower_tier.ask_first), lives.moved.of(lower_tier.ask_first)
    assert (heads(before), said(after)) == (0, said(before))
    assert heads(after) >= 4 * BLOCK
    assert lives.moved.of(lower_tier.counts)["loaded"] > 0


def test_restart_adapter_replaced_under_its_name_finds_nothing_of_before(lives: Lives) -> None:
    before, after = lives.first.of(ask_adapter), lives.moved.of(ask_adapter)
    assert (before["cached"], after["cached"]) == (0, 0)
    assert after["logprobs"] != before["logprobs"]


def test_restart_after_a_reset_finds_nothing_of_before(lives: Lives) -> None:
    assert lives.moved.of(lower_tier.after_reset) == [0]
    answers = lives.after_reset.of(lower_tier.ask_first)
    assert heads(answers) == 0
    assert said(answers) == said(lives.first.of(lower_tier.ask_first))
    assert lives.after_reset.of(lower_tier.counts)["stored"] > 0  # the next would find these


def test_restart_other_weights_at_the_same_path_find_nothing_of_before(lives: Lives) -> None:
    answers = lives.retrained.of(lower_tier.ask_first)
    assert heads(answers) == 0
    assert lives.retrained.of(lower_tier.counts)["loaded"] == 0
    right = lives.reference.of(lower_tier.ask_first)
    assert answers == right
    assert said(right) != said(lives.after_reset.of(lower_tier.ask_first))
