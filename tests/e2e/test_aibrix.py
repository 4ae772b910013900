"""An engine starts with the environment of AIBrix's offloading and logs one warning about it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import RunEngine
from tests.support.engine.engine import Engine, prompt
from tests.support.engine.process import startup

pytestmark = pytest.mark.engine

PREFIX = "AIBRIX_KV_CACHE_OL_"


def complete_twice(engine: Engine) -> dict[str, Any]:
    """Complete a prompt before and after a reset of vLLM's own cache."""
    asked = prompt("aibrix", 100)
    first = engine.complete(asked)
    engine.llm.reset_prefix_cache()
    second = engine.complete(asked)
    return {
        "cached": second["cached"], "same": second["tokens"] == first["tokens"],
        "nbytes": engine.stack.front.slab.nbytes,
    }  # fmt: skip


def test_start_with_aibrix_variables_logs_one_warning_and_has_hits(run_engine: RunEngine) -> None:
    environment = {
        "KVCACHE_PROFILE": "",
        "KVCACHE__L1__CAPACITY": "",
        f"{PREFIX}L1_CACHE_ENABLED": "1",
        f"{PREFIX}L1_CACHE_EVICTION_POLICY": "S3FIFO",
        f"{PREFIX}L1_CACHE_CAPACITY_GB": "0.0625",
        f"{PREFIX}CHUNK_SIZE": "512",
    }
    play = run_engine([complete_twice], blocks=100, l1="none of ours", environment=environment)
    facts = play.result_of(complete_twice)
    assert facts == {"cached": facts["cached"], "same": True, "nbytes": 64 << 20}
    assert facts["cached"] > 0
    [line] = play.warnings_of(startup)
    assert f"{PREFIX}L1_CACHE_EVICTION_POLICY as eviction of l1" in line
    assert f"{PREFIX}L1_CACHE_CAPACITY_GB as capacity of l1" in line
    assert f"no effect: {PREFIX}CHUNK_SIZE" in line
