"""A tiny engine with kvcache answers as a large one does that never forgot a block."""

import pytest

from tests.e2e import acts
from tests.e2e.conftest import Stage
from tests.e2e.engine import Act, Play

pytestmark = pytest.mark.engine

TINY, LARGE = 40, 1000  # blocks; the longest prompt takes 32


@pytest.fixture(scope="module")
def kept(stage: Stage) -> Play:
    return stage(acts.SAME, blocks=TINY, l1="64MiB")


@pytest.fixture(scope="module")
def reference(stage: Stage) -> Play:
    return stage(acts.SAME, blocks=LARGE)


@pytest.mark.parametrize("act", acts.SAME, ids=lambda act: act.__name__)
def test_answers_and_hits_are_those_of_a_cache_that_keeps_all(
    kept: Play, reference: Play, act: Act
) -> None:
    assert kept.of(act) == reference.of(act)
