"""A model with a KV cache that kvcache cannot store runs without it, after one warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine
from tests.support.engine.checkpoints import (
    DEEPSEEK_V2,
    GPT_OSS,
    LFM_2,
    write_model,
    write_tokenizer,
)
from tests.support.engine.engine import CONNECTOR, Engine, prompt
from tests.support.engine.process import startup

pytestmark = pytest.mark.engine


def complete_twice(engine: Engine) -> dict[str, Any]:
    """Complete a prompt twice, then once more after a reset of both caches."""
    asked = prompt("refused", 100)
    first = engine.complete(asked)
    own = engine.complete(asked)["cached"]
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    second = engine.complete(asked)
    return {
        "own": own, "cached": second["cached"], "same": second == first,
        "stats": engine.scheduler.connector.stats(),
        "tables": engine.scheduler_side.table_sizes()["admitted"],
    }  # fmt: skip


def test_states_without_prefix_caching_are_not_stored_after_one_warning(
    run_engine: RunEngine, tmp_path: Path
) -> None:
    """With prefix caching off, vLLM keeps no state but the last."""
    checkpoint = write_model(tmp_path, LFM_2)
    options = {"enable_prefix_caching": False, "dtype": "float32"}
    play = run_engine(
        [complete_twice], checkpoint=str(checkpoint), blocks=100, l1="64MiB", options=options
    )
    assert play.result_of(complete_twice) == {
        "own": 0, "cached": 0, "same": True, "stats": None, "tables": 0,
    }  # fmt: skip
    [warning] = play.warnings_of(startup)
    assert "no block is kept or found" in warning
    assert "mamba_cache_mode is 'none'" in warning


def complete_second_turn(engine: Engine) -> dict[str, Any]:
    """Complete a second turn with empty caches, and after the first turn."""
    first, second = prompt("a", 200), prompt("a", 200) + prompt("b", 60)
    engine.reset_all_caches()
    expected = engine.complete(second)
    engine.reset_all_caches()
    engine.complete(first)
    engine.reset_own_cache()
    answer = engine.complete(second)
    return {
        "vllm caches": engine.core.vllm_config.cache_config.enable_prefix_caching,
        "cached": answer.pop("cached"),
        "expected cached": expected.pop("cached"),
        "same": answer == expected,
    }


def test_mla_has_hits_only_where_vllm_can_resume_a_prompt(
    run_engine: RunEngine, tmp_path: Path
) -> None:
    """On a CPU without AMX, vLLM cannot resume a prompt of DeepSeek-V2 and turns caching off."""
    checkpoint = write_model(tmp_path, DEEPSEEK_V2)
    play = run_engine([complete_second_turn], checkpoint=str(checkpoint), blocks=200, l1="64MiB")
    facts = play.result_of(complete_second_turn)
    assert facts["same"]
    assert facts["expected cached"] == 0
    if facts["vllm caches"]:  # with AMX
        assert facts["cached"] == 192
        assert play.warnings_of(startup) == []
    else:
        assert facts["cached"] == 0
        [warning] = play.warnings_of(startup)
        assert "prefix caching and chunked prefill are both off" in warning


def embed_twice(engine: Engine) -> dict[str, Any]:
    """Embed a prompt twice; the mean is over all tokens of the prompt."""
    asked = {"prompt_token_ids": prompt("mean", 100)}
    [first] = engine.llm.embed([asked])
    engine.reset_own_cache()
    [second] = engine.llm.embed([asked])
    return {"same": second.outputs.embedding == first.outputs.embedding}


def test_mean_pooling_has_no_hits(run_engine: RunEngine, tmp_path: Path) -> None:
    options = {
        "skip_tokenizer_init": False,  # pooling needs a tokenizer
        "tokenizer": str(write_tokenizer(tmp_path)),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"seq_pooling_type": "MEAN"},
        "enable_prefix_caching": None,  # as vLLM decides
    }
    play = run_engine([embed_twice], blocks=100, l1="64MiB", budget=1024, options=options)
    assert play.result_of(embed_twice) == {"same": True}
    [warning] = play.warnings_of(startup)
    assert "does not support prefix caching for this model or its pooling" in warning


def test_hybrid_model_as_one_group_has_hits_without_a_cache_of_vllm(
    run_engine: RunEngine, tmp_path: Path
) -> None:
    """kvcache serves hits with prefix caching off, under a MultiConnector with its own policy."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

    inner = {name: CONNECTOR[name] for name in CONNECTOR if name != "kv_load_failure_policy"}
    options = {
        "disable_hybrid_kv_cache_manager": True,
        "enable_prefix_caching": False,
        # In one process, the MultiConnector of vLLM 0.29 cannot read the counts of its connectors.
        "disable_log_stats": not hasattr(KVConnectorStats, "to_dict"),
        "kv_transfer_config": {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": [inner]},
        },
    }
    checkpoint = write_model(tmp_path, GPT_OSS)
    play = run_engine(
        [complete_second_turn], checkpoint=str(checkpoint), blocks=200, l1="64MiB", options=options
    )
    assert play.result_of(startup) is None
    assert play.result_of(complete_second_turn) == {
        "vllm caches": False, "expected cached": 0, "cached": 192, "same": True,
    }  # fmt: skip
