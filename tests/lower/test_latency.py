"""Predictions of durations from the durations of earlier calls."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.lower.latency import ComputeModel, LatencyModel

sizes = st.floats(0.1, 1e4)
times = st.floats(0, 100)


def test_latency_without_samples_is_unknown() -> None:
    model = LatencyModel()
    assert not model.known
    assert model.optimistic(5) is None
    assert model.pessimistic(5) is None


@pytest.mark.parametrize(("latency", "each"), [(0.5, 0.01), (0.0, 0.01), (0.5, 0.0)])
def test_latency_of_several_sizes_finds_the_line(latency: float, each: float) -> None:
    model = LatencyModel()
    for blocks in (4, 16, 64, 4, 100):
        model.observe(blocks, latency + each * blocks)
    assert model.known
    for blocks in (1, 10, 100):
        assert model.optimistic(blocks) == pytest.approx(latency + each * blocks)
        assert model.pessimistic(blocks) == pytest.approx(latency + each * blocks)


def test_latency_beyond_the_largest_sample_has_two_bounds() -> None:
    model = LatencyModel()
    for blocks in (10, 20):
        model.observe(blocks, 1.0 + 0.1 * blocks)
    assert model.optimistic(200) == pytest.approx(21.0)
    assert model.pessimistic(200) == pytest.approx(30.0)  # ten times as long as 20


def test_latency_of_samples_of_one_size_is_proportional() -> None:
    model = LatencyModel()
    for _ in range(3):
        model.observe(8, 2.0)
    assert model.optimistic(16) == model.pessimistic(16) == pytest.approx(4.0)


def test_latency_that_falls_with_the_size_is_averaged() -> None:
    model = LatencyModel()
    model.observe(10, 5.0)
    model.observe(100, 1.0)
    assert 0 < (model.optimistic(1000) or 0) < 5


def test_latency_follows_the_last_few_samples() -> None:
    model = LatencyModel()
    for _ in range(50):
        model.observe(10, 10.0)
    for _ in range(10):
        model.observe(10, 1.0)
    assert model.optimistic(10) == pytest.approx(1.0, rel=0.5)


@given(st.lists(st.tuples(sizes, times), min_size=1, max_size=20), st.lists(sizes, min_size=2))
def test_latency_of_more_blocks_is_never_less(
    samples: list[tuple[float, float]], asked: list[float]
) -> None:
    model = LatencyModel()
    for blocks, seconds in samples:
        model.observe(blocks, seconds)
    for bound in (model.optimistic, model.pessimistic):
        answers = [bound(blocks) or 0.0 for blocks in sorted(asked)]
        assert answers[0] >= 0
        for less, more in pairwise(answers):
            assert more >= less * (1 - 1e-6) - 1e-9


# ComputeModel: attention also reads the blocks before each computed block


def seconds(blocks: float, start: float, flat: float = 0.01, slope: float = 1e-4) -> float:
    """How long a step of ``blocks`` takes after ``start`` blocks of its prompt."""
    return flat * blocks + slope * blocks * (start + blocks / 2)


def compute_prompt(model: ComputeModel, blocks: int, chunk: int = 64, slope: float = 1e-4) -> None:
    for start in range(0, blocks, chunk):
        n = min(chunk, blocks - start)
        model.observe(n, seconds(n, start, slope=slope), start + n / 2)


def test_compute_model_without_samples_returns_none() -> None:
    assert not ComputeModel().known
    assert ComputeModel().pessimistic(5) is None


def test_compute_model_of_chunks_of_one_size_finds_the_cost_of_depth() -> None:
    model = ComputeModel()
    compute_prompt(model, 640)
    for blocks, start in [(10, 0), (10, 600), (640, 0), (1000, 500)]:
        assert model.pessimistic(blocks, start) == pytest.approx(seconds(blocks, start), rel=0.02)


def test_compute_model_remembers_the_cost_of_depth_over_many_short_prompts() -> None:
    model = ComputeModel()
    compute_prompt(model, 1000)
    for blocks in [3, 10, 30] * 20:
        compute_prompt(model, blocks)
    assert model.pessimistic(1000) == pytest.approx(seconds(1000, 0), rel=0.1)
    assert model.pessimistic(10) == pytest.approx(seconds(10, 0), rel=0.1)


def test_compute_model_without_a_cost_of_depth_is_a_line() -> None:
    model = ComputeModel()
    compute_prompt(model, 640, slope=0.0)
    compute_prompt(model, 30, slope=0.0)
    assert model.pessimistic(1000, 500) == pytest.approx(10.0)


def test_compute_model_of_a_fixed_time_per_step_has_no_cost_of_depth() -> None:
    """A short step takes as long as reading the weights; that must not look like depth."""
    model = ComputeModel()
    for blocks in [1, 2, 4, 8, 16, 32, 64] * 5:
        model.observe(blocks, max(0.2, 0.0125 * blocks))
    assert model.pessimistic(1000) == pytest.approx(12.5, rel=0.3)


def test_compute_model_far_deeper_than_its_samples_is_bounded() -> None:
    model = ComputeModel()
    compute_prompt(model, 64, chunk=8)
    deep = model.pessimistic(1, 10_000)
    assert deep == model.pessimistic(1, 20_000)
    assert seconds(1, 64) < (deep or 0) < seconds(1, 300)


depths = st.floats(0, 1e4)


@given(
    st.lists(st.tuples(sizes, times, depths), min_size=1, max_size=20),
    st.lists(sizes, min_size=2),
    st.lists(depths, min_size=2),
)
def test_compute_model_of_more_or_deeper_blocks_is_never_less(
    samples: list[tuple[float, float, float]], asked: list[float], starts: list[float]
) -> None:
    model = ComputeModel()
    for blocks, took, depth in samples:
        model.observe(blocks, took, depth)
    more = [model.pessimistic(blocks, starts[0]) or 0.0 for blocks in sorted(asked)]
    deeper = [model.pessimistic(asked[0], start) or 0.0 for start in sorted(starts)]
    for answers in (more, deeper):
        assert answers[0] >= 0
        for less, then in pairwise(answers):
            assert then >= less * (1 - 1e-6) - 1e-9
