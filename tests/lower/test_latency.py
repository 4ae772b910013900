"""How long something takes, from how long it took."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.lower.latency import ComputeModel, LatencyModel

sizes = st.floats(0.1, 1e4)
times = st.floats(0, 100)


def test_nothing_is_known_before_it_is_told() -> None:
    pace = LatencyModel()
    assert not pace.known
    assert pace.optimistic(5) is None
    assert pace.pessimistic(5) is None


@pytest.mark.parametrize(("latency", "each"), [(0.5, 0.01), (0.0, 0.01), (0.5, 0.0)])
def test_a_line_is_found(latency: float, each: float) -> None:
    pace = LatencyModel()
    for blocks in (4, 16, 64, 4, 100):
        pace.observe(blocks, latency + each * blocks)
    assert pace.known
    for blocks in (1, 10, 100):
        assert pace.optimistic(blocks) == pytest.approx(latency + each * blocks)
        assert pace.pessimistic(blocks) == pytest.approx(latency + each * blocks)


def test_beyond_what_was_told_of_the_two_bounds_part() -> None:
    pace = LatencyModel()
    for blocks in (10, 20):
        pace.observe(blocks, 1.0 + 0.1 * blocks)
    assert pace.optimistic(200) == pytest.approx(21.0)
    assert pace.pessimistic(200) == pytest.approx(30.0)  # ten times as long as 20


def test_of_one_size_alone_more_takes_as_much_more() -> None:
    pace = LatencyModel()
    for _ in range(3):
        pace.observe(8, 2.0)
    assert pace.optimistic(16) == pace.pessimistic(16) == pytest.approx(4.0)


def test_what_takes_less_for_more_is_taken_for_a_mean() -> None:
    pace = LatencyModel()
    pace.observe(10, 5.0)
    pace.observe(100, 1.0)
    assert 0 < (pace.optimistic(1000) or 0) < 5


def test_the_last_few_count() -> None:
    pace = LatencyModel()
    for _ in range(50):
        pace.observe(10, 10.0)
    for _ in range(10):
        pace.observe(10, 1.0)
    assert pace.optimistic(10) == pytest.approx(1.0, rel=0.5)


@given(st.lists(st.tuples(sizes, times), min_size=1, max_size=20), st.lists(sizes, min_size=2))
def test_more_blocks_never_take_less(told: list[tuple[float, float]], asked: list[float]) -> None:
    pace = LatencyModel()
    for blocks, seconds in told:
        pace.observe(blocks, seconds)
    for bound in (pace.optimistic, pace.pessimistic):
        answers = [bound(blocks) or 0.0 for blocks in sorted(asked)]
        assert answers[0] >= 0
        for less, more in pairwise(answers):
            assert more >= less * (1 - 1e-6) - 1e-9


# Of an engine, whose attention reads the blocks before each block


def seconds(blocks: float, start: float, flat: float = 0.01, slope: float = 1e-4) -> float:
    return flat * blocks + slope * blocks * (start + blocks / 2)


def prompt(pace: ComputeModel, blocks: int, chunk: int = 64, slope: float = 1e-4) -> None:
    for start in range(0, blocks, chunk):
        n = min(chunk, blocks - start)
        pace.observe(n, seconds(n, start, slope=slope), start + n / 2)


def test_compute_pace_without_samples_returns_none() -> None:
    assert not ComputeModel().known
    assert ComputeModel().pessimistic(5) is None


def test_compute_pace_of_chunks_of_one_size_finds_the_cost_of_depth() -> None:
    pace = ComputeModel()
    prompt(pace, 640)
    for blocks, start in [(10, 0), (10, 600), (640, 0), (1000, 500)]:
        assert pace.pessimistic(blocks, start) == pytest.approx(seconds(blocks, start), rel=0.02)


def test_compute_pace_remembers_the_cost_of_depth_over_many_short_prompts() -> None:
    pace = ComputeModel()
    prompt(pace, 1000)
    for blocks in [3, 10, 30] * 20:
        prompt(pace, blocks)
    assert pace.pessimistic(1000) == pytest.approx(seconds(1000, 0), rel=0.1)
    assert pace.pessimistic(10) == pytest.approx(seconds(10, 0), rel=0.1)


def test_compute_pace_without_a_cost_of_depth_is_a_line() -> None:
    pace = ComputeModel()
    prompt(pace, 640, slope=0.0)
    prompt(pace, 30, slope=0.0)
    assert pace.pessimistic(1000, 500) == pytest.approx(10.0)


def test_compute_pace_of_a_fixed_time_per_step_has_no_cost_of_depth() -> None:
    """A short step takes as long as reading the weights does: that is no curve of depth."""
    pace = ComputeModel()
    for blocks in [1, 2, 4, 8, 16, 32, 64] * 5:
        pace.observe(blocks, max(0.2, 0.0125 * blocks))
    assert pace.pessimistic(1000) == pytest.approx(12.5, rel=0.3)


def test_compute_pace_far_deeper_than_its_samples_is_bounded() -> None:
    pace = ComputeModel()
    prompt(pace, 64, chunk=8)
    deep = pace.pessimistic(1, 10_000)
    assert deep == pace.pessimistic(1, 20_000)
    assert seconds(1, 64) < (deep or 0) < seconds(1, 300)


depths = st.floats(0, 1e4)


@given(
    st.lists(st.tuples(sizes, times, depths), min_size=1, max_size=20),
    st.lists(sizes, min_size=2),
    st.lists(depths, min_size=2),
)
def test_compute_pace_of_more_or_deeper_blocks_is_never_less(
    told: list[tuple[float, float, float]], asked: list[float], starts: list[float]
) -> None:
    pace = ComputeModel()
    for blocks, took, depth in told:
        pace.observe(blocks, took, depth)
    more = [pace.pessimistic(blocks, starts[0]) or 0.0 for blocks in sorted(asked)]
    deeper = [pace.pessimistic(asked[0], start) or 0.0 for start in sorted(starts)]
    for answers in (more, deeper):
        assert answers[0] >= 0
        for less, then in pairwise(answers):
            assert then >= less * (1 - 1e-6) - 1e-9
