"""Fixtures of the tests of secondary tiers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def same_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engines of a test load the same weights, and share no blocks with another test."""
    from tests.support.played_tiering import SharedFaultyTier

    monkeypatch.setenv("KVCACHE_IDENTITY", "the same weights")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # vLLM's configuration of a CPU needs it
    SharedFaultyTier.shared.clear()
    SharedFaultyTier.opened.clear()
    yield
    for tier in SharedFaultyTier.opened:
        tier.gate.set()


@pytest.fixture
def disk_options(tmp_path: Path) -> dict[str, object]:
    """Options of a secondary tier with a disk, as in vLLM's configuration."""
    from tests.support.played_tiering import disk_table

    return {"tiers": [disk_table(tmp_path)]}


@pytest.fixture
def faulty_options() -> dict[str, object]:
    """Options of a secondary tier that keeps blocks in a dictionary."""
    from tests.support.played_tiering import SharedFaultyTier

    return {"tiers": [SharedFaultyTier.table()]}
