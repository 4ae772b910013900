"""Random walks of the scheduler's side through a miniature engine.

Invariants: L1 never holds or returns content other than its key's, nor content from before the last
reset. When no request is left and no copy is under way, no slot is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.miniature_engine import MiniatureEngine
from tests.support.miniature_workers import RANKS, SLOTS

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def small_l1() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCACHE__L1__CAPACITY", str(SLOTS * 4096 * len(RANKS)))
        yield


@pytest.mark.parametrize("reports_first", [False, True], ids=["reports-last", "reports-first"])
@pytest.mark.parametrize("ahead", [False, True], ids=["in-step", "ahead"])
@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_walk_l1_holds_what_its_keys_say(
    ahead: bool, reports_first: bool, seed: int
) -> None:
    random = Random(seed)
    engine = MiniatureEngine(random, ahead=ahead, reports_first=reports_first)
    for _ in range(random.randrange(20, 120)):
        event = random.random()
        if event < 0.30:
            engine.ask()
        elif event < 0.36:
            engine.abort()
        elif event < 0.39:
            engine.reset()
        else:
            engine.step()
    engine.end()
