"""Real engines: a small checkpoint for all of them, and a stage that starts one and plays acts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.engine import VOCABULARY, Setup
from tests.support.engine.process import Act, Play, play

Stage = Callable[..., Play]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers whose KV cache decides which token comes next; 32 KiB to a block in bfloat16."""
    pytest.importorskip("vllm")
    from kvcache.cli.demo.checkpoint import write

    return write(
        tmp_path_factory.mktemp("checkpoint"),
        layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256,
        vocabulary=VOCABULARY, positions=4096,
    )  # fmt: skip


@pytest.fixture(scope="session")
def stage(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Start an engine with these settings in a process of its own and play the acts on it."""

    def perform(acts: Sequence[Act], **settings: Any) -> Play:
        setup = Setup(**{"checkpoint": str(checkpoint)} | settings)
        return play(setup, acts, tmp_path_factory.mktemp("engine"))

    return perform
