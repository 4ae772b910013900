"""How long something takes, from how long it took."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.pace import Pace

sizes = st.floats(0.1, 1e4)
times = st.floats(0, 100)


def test_nothing_is_known_before_it_is_told() -> None:
    pace = Pace()
    assert not pace.known
    assert pace.least(5) is None
    assert pace.most(5) is None


@pytest.mark.parametrize(("latency", "each"), [(0.5, 0.01), (0.0, 0.01), (0.5, 0.0)])
def test_a_line_is_found(latency: float, each: float) -> None:
    pace = Pace()
    for blocks in (4, 16, 64, 4, 100):
        pace.told(blocks, latency + each * blocks)
    assert pace.known
    for blocks in (1, 10, 100):
        assert pace.least(blocks) == pytest.approx(latency + each * blocks)
        assert pace.most(blocks) == pytest.approx(latency + each * blocks)


def test_beyond_what_was_told_of_the_two_bounds_part() -> None:
    pace = Pace()
    for blocks in (10, 20):
        pace.told(blocks, 1.0 + 0.1 * blocks)
    assert pace.least(200) == pytest.approx(21.0)
    assert pace.most(200) == pytest.approx(30.0)  # ten times as long as 20


def test_of_one_size_alone_more_takes_as_much_more() -> None:
    pace = Pace()
    for _ in range(3):
        pace.told(8, 2.0)
    assert pace.least(16) == pace.most(16) == pytest.approx(4.0)


def test_what_takes_less_for_more_is_taken_for_a_mean() -> None:
    pace = Pace()
    pace.told(10, 5.0)
    pace.told(100, 1.0)
    assert 0 < (pace.least(1000) or 0) < 5


def test_the_last_few_count() -> None:
    pace = Pace()
    for _ in range(50):
        pace.told(10, 10.0)
    for _ in range(10):
        pace.told(10, 1.0)
    assert pace.least(10) == pytest.approx(1.0, rel=0.5)


@given(st.lists(st.tuples(sizes, times), min_size=1, max_size=20), st.lists(sizes, min_size=2))
def test_more_blocks_never_take_less(told: list[tuple[float, float]], asked: list[float]) -> None:
    pace = Pace()
    for blocks, seconds in told:
        pace.told(blocks, seconds)
    for bound in (pace.least, pace.most):
        answers = [bound(blocks) or 0.0 for blocks in sorted(asked)]
        assert answers[0] >= 0
        for less, more in pairwise(answers):
            assert more >= less * (1 - 1e-6) - 1e-9
