"""Random walks of the scheduler's half through an engine in miniature.

What must hold: L1 never has, and never gives, other content than its key says, nor any from before
the last reset; and when no request is left and no copy goes on, no lease is either.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.miniature_engine import Miniature
from tests.support.miniature_workers import RANKS, SLOTS

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def a_small_l1() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCACHE__L1__CAPACITY", str(SLOTS * 4096 * len(RANKS)))
        yield


@pytest.mark.parametrize("reports_first", [False, True], ids=["reports-last", "reports-first"])
@pytest.mark.parametrize("ahead", [False, True], ids=["in-step", "ahead"])
@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1))
def test_l1_holds_what_its_keys_say(ahead: bool, reports_first: bool, seed: int) -> None:
    random = Random(seed)
    engine = Miniature(random, ahead=ahead, reports_first=reports_first)
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
