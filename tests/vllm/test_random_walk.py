"""Random walks under vLLM's own scheduler and both model runners, over models with one group.

Invariants: L1 never holds or returns content other than its key's, nor content from before the last
reset. A forward pass computes from right blocks in any legal order of the device's streams, unless
vLLM itself recomputes them. When no request is left and no copy is under way, no slot is pinned.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support.groups_walk import prepare_walk, walk
from tests.support.played_models import MODELS
from tests.support.played_scheduler import write_config

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_walk(monkeypatch)


@pytest.mark.parametrize("second_runner", [False, True], ids=["first-runner", "second-runner"])
@pytest.mark.parametrize("is_ahead", [False, True], ids=["in-step", "ahead"])
@pytest.mark.parametrize("name", ["full", "mla", "full with drafts"])
@settings(max_examples=8, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_random_walk_l1_holds_what_its_keys_say(
    second_runner: bool, is_ahead: bool, name: str, folder: Path, seed: int
) -> None:
    walk(MODELS[name], folder, seed, second_runner=second_runner, is_ahead=is_ahead)
