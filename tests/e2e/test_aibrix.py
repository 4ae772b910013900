"""An environment made for AIBrix's offloading: the engine starts on it, and one line says so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine.engine import Engine, prompt
from tests.support.engine.process import starts

pytestmark = pytest.mark.engine

PREFIX = "AIBRIX_KV_CACHE_OL_"


def asked_twice(engine: Engine) -> dict[str, Any]:
    """The second time the engine's own cache has nothing."""
    asked = prompt("aibrix", 100)
    first = engine.ask(asked)
    engine.llm.reset_prefix_cache()
    second = engine.ask(asked)
    return {
        "cached": second["cached"], "same": second["tokens"] == first["tokens"],
        "nbytes": engine.side.stack.front.slab.nbytes,
    }  # fmt: skip


def test_aibrix_environment(stage: Stage) -> None:
    environment = {
        "KVCACHE_PROFILE": "",
        "KVCACHE__L1__CAPACITY": "",
        f"{PREFIX}L1_CACHE_ENABLED": "1",
        f"{PREFIX}L1_CACHE_EVICTION_POLICY": "S3FIFO",
        f"{PREFIX}L1_CACHE_CAPACITY_GB": "0.0625",
        f"{PREFIX}CHUNK_SIZE": "512",
    }
    play = stage([asked_twice], blocks=100, l1="none of ours", environment=environment)
    facts = play.of(asked_twice)
    assert facts == {"cached": facts["cached"], "same": True, "nbytes": 64 << 20}
    assert facts["cached"] > 0
    [line] = play.warnings(starts)
    assert f"{PREFIX}L1_CACHE_EVICTION_POLICY as eviction of l1" in line
    assert f"{PREFIX}L1_CACHE_CAPACITY_GB as capacity of l1" in line
    assert f"no effect: {PREFIX}CHUNK_SIZE" in line
