"""A model whose cache kvcache cannot keep runs as without it, and one warning says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine.checkpoints import DEEPSEEK_V2, GPT_OSS, write_model, write_tokenizer
from tests.support.engine.engine import CONNECTOR, VOCABULARY, Engine, prompt
from tests.support.engine.process import starts

pytestmark = pytest.mark.engine


def asked_twice(engine: Engine) -> dict[str, Any]:
    """Nothing is found after the engine's own cache was reset, and a reset of ours is no error."""
    asked = prompt("sliding", 100)
    first = engine.ask(asked)
    own = engine.ask(asked)["cached"]
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    second = engine.ask(asked)
    return {
        "own": own, "cached": second["cached"], "same": second == first,
        "stats": engine.scheduler.connector.stats(),
        "tables": engine.side.table_sizes()["admitted"],
    }  # fmt: skip


def test_sliding_window(stage: Stage, tmp_path: Path) -> None:
    from kvcache.cli.demo.checkpoint import write

    write(
        tmp_path,
        layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256,
        vocabulary=VOCABULARY,
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    play = stage([asked_twice], checkpoint=str(tmp_path), blocks=100, l1="64MiB")
    facts = play.of(asked_twice)
    assert facts["own"] > 0
    assert facts == {
        "own": facts["own"], "cached": 0, "same": True, "stats": None, "tables": 0,
    }  # fmt: skip
    [warning] = play.warnings(starts)
    assert "no block is kept or found" in warning
    assert "SlidingWindowSpec" in warning


def asked_beyond_a_prefix(engine: Engine) -> dict[str, Any]:
    """A second turn of a conversation is answered as by an engine that has computed nothing."""
    first, second = prompt("a", 200), prompt("a", 200) + prompt("b", 60)
    engine.fresh()
    expected = engine.ask(second)
    engine.fresh()
    engine.ask(first)
    engine.evict_own()
    answer = engine.ask(second)
    return {
        "vllm caches": engine.core.vllm_config.cache_config.enable_prefix_caching,
        "cached": answer.pop("cached"),
        "expected cached": expected.pop("cached"),
        "same": answer == expected,
    }


def test_mla_has_hits_only_where_vllm_can_resume_a_prompt(stage: Stage, tmp_path: Path) -> None:
    """On a CPU without AMX vLLM computes a prompt of DeepSeek-V2 whole, or wrong."""
    checkpoint = write_model(tmp_path, DEEPSEEK_V2)
    play = stage([asked_beyond_a_prefix], checkpoint=str(checkpoint), blocks=200, l1="64MiB")
    facts = play.of(asked_beyond_a_prefix)
    assert facts["same"]
    assert facts["expected cached"] == 0
    if facts["vllm caches"]:  # with AMX
        assert facts["cached"] == 192
        assert play.warnings(starts) == []
    else:
        assert facts["cached"] == 0
        [warning] = play.warnings(starts)
        assert "prefix caching and chunked prefill are both off" in warning


def embedded_twice(engine: Engine) -> dict[str, Any]:
    """The engine lives on, and the mean is over all of the prompt."""
    asked = {"prompt_token_ids": prompt("mean", 100)}
    [first] = engine.llm.embed([asked])
    engine.evict_own()
    [second] = engine.llm.embed([asked])
    return {"same": second.outputs.embedding == first.outputs.embedding}


def test_mean_pooling_has_no_hits(stage: Stage, tmp_path: Path) -> None:
    options = {
        "skip_tokenizer_init": False,  # vLLM's pooling needs one
        "tokenizer": str(write_tokenizer(tmp_path)),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"seq_pooling_type": "MEAN"},
        "enable_prefix_caching": None,  # as vLLM decides
    }
    play = stage([embedded_twice], blocks=100, l1="64MiB", budget=1024, options=options)
    assert play.of(embedded_twice) == {"same": True}
    [warning] = play.warnings(starts)
    assert "does not support prefix caching for this model or its pooling" in warning


def test_hybrid_model_as_one_group_has_hits_without_a_cache_of_vllm(
    stage: Stage, tmp_path: Path
) -> None:
    """The user's own --no-enable-prefix-caching keeps hits, and MultiConnector's policy counts."""
    inner = {name: CONNECTOR[name] for name in CONNECTOR if name != "kv_load_failure_policy"}
    options = {
        "disable_hybrid_kv_cache_manager": True,
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": [inner]},
        },
    }
    checkpoint = write_model(tmp_path, GPT_OSS)
    play = stage(
        [asked_beyond_a_prefix], checkpoint=str(checkpoint), blocks=200, l1="64MiB", options=options
    )
    assert play.of(starts) is None
    assert play.of(asked_beyond_a_prefix) == {
        "vllm caches": False, "expected cached": 0, "cached": 192, "same": True,
    }  # fmt: skip
