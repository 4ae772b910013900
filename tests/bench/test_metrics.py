"""What it costs to tell how long a call took, with no provider installed."""

import timeit

import pytest

from kvcache.metrics import Timer
from kvcache.stats import TierName

pytestmark = pytest.mark.bench


def test_telling_costs_next_to_nothing() -> None:
    timer = Timer(TierName("l1", "dram"))
    took = (
        min(timeit.repeat(lambda: timer.record("lookup", 1e-3), number=20_000, repeat=7)) / 20_000
    )
    print(took)
    assert took <= 2e-6
