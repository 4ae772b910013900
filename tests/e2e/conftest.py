"""A small checkpoint for all engines, and a function that runs scenarios on an engine."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.checkpoints import HYBRIDS, write_model
from tests.support.engine.engine import VOCABULARY, EngineSettings
from tests.support.engine.process import EngineRun, Scenario, run_scenarios

RunEngine = Callable[..., EngineRun]
HybridCheckpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers; attention is sharp, so a wrong KV cache changes tokens. 32 KiB per block."""
    pytest.importorskip("vllm")
    from kvcache.cli.demo.checkpoint import write

    return write(
        tmp_path_factory.mktemp("checkpoint"),
        layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256,
        vocabulary=VOCABULARY, positions=4096,
    )  # fmt: skip


@pytest.fixture(scope="session")
def hybrid_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> HybridCheckpoint:
    """A function that returns the checkpoint of one of `HYBRIDS`, and writes it at first."""
    folder = tmp_path_factory.mktemp("hybrid")
    return cache(lambda name: write_model(folder / name, HYBRIDS[name]))


@pytest.fixture(scope="session")
def run_engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> RunEngine:
    """A function that runs scenarios on an engine with these fields of `EngineSettings`."""

    def run(scenarios: Sequence[Scenario], **fields: Any) -> EngineRun:
        settings = EngineSettings(**{"checkpoint": str(checkpoint)} | fields)
        return run_scenarios(settings, scenarios, tmp_path_factory.mktemp("engine"))

    return run
