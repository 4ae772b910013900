"""A model whose cache kvcache cannot keep runs as without it, and one warning says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Stage
from tests.e2e.engine import VOCABULARY, Engine, prompt, starts

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
        "stats": engine.scheduler.connector.stats(), "tables": len(engine.side._running),
    }  # fmt: skip


def test_sliding_window(stage: Stage, tmp_path: Path) -> None:
    from kvcache.cli.checkpoint import write

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
    assert "nothing is kept or found" in warning
    assert "SlidingWindowSpec" in warning
