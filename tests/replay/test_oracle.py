"""Hints in a replay: they are true, a share of them, and do what those of a live stack do."""

from dataclasses import replace

import pytest

from kvcache.replay.belady import optimum
from kvcache.replay.generators import generate
from kvcache.replay.oracle import with_hints
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Request, Trace
from tests.support.eviction_traffic import with_conversation
from tests.support.traces import chains, conversation


def first_half(trace: Trace) -> Trace:
    count = len(trace) // 2
    end = trace.ends[count]
    return replace(
        trace,
        times_s=trace.times_s[:count],
        tokens=trace.tokens[:count],
        ends=trace.ends[: count + 1],
        blocks=trace.blocks[:end],
        done=trace.done[:count],
    )


def test_who_ends_says_so() -> None:
    trace = chains([1, 2, 3], [1, 4], [1, 2, 5])
    assert list(with_hints(trace, 1.0).done) == [2, 1, 0]
    assert with_hints(trace, 0.0) == trace


def test_what_the_trace_says_stays() -> None:
    requests = [Request(0.0, 3, [1, 2, 3], 1), Request(1.0, 2, [1, 2])]
    trace = Trace.of(requests, 1)
    assert list(trace.done) == [1, 2]
    assert list(with_hints(trace, 1.0).done) == [1, 0]


def test_a_share_says_so_the_same_for_each_seed() -> None:
    trace = generate("chat", 2000)
    every = with_hints(trace, 1.0)
    lengths = [end - start for start, end in zip(trace.ends, trace.ends[1:], strict=False)]

    def saying(hinted: Trace) -> set[int]:
        return {at for at, done in enumerate(hinted.done) if done < lengths[at]}

    some = with_hints(trace, 0.75, seed=1)
    assert saying(some) < saying(every)
    assert len(saying(some)) == pytest.approx(0.75 * len(saying(every)), rel=0.05)
    assert some == with_hints(trace, 0.75, seed=1) != with_hints(trace, 0.75, seed=2)


@pytest.mark.parametrize("policy", ["lru", "gittins"])
@pytest.mark.parametrize("capacity", [200, 1000])
def test_who_is_told_everything_finds_what_can_be_found(policy: str, capacity: int) -> None:
    """Blocks that will be used fit: nothing but these is kept."""
    trace = generate("chat", 1500)
    most = optimum(trace, capacity).hit_blocks
    told = replay(with_hints(trace, 1.0), policy, [capacity]).hit_blocks
    assert replay(trace, policy, [capacity]).hit_blocks < told <= most


@with_conversation
@pytest.mark.parametrize(
    ("policy", "share", "ratio"),
    [
        ("lru", 0.75, 29.46),
        ("gittins", 0.75, 30.84),
        ("lru", 1.0, 34.56),
        ("gittins", 1.0, 34.56),
    ],
)
def test_the_conversation(policy: str, share: float, ratio: float) -> None:
    """The bars: 28 % with three quarters of all hints, 33 % with all; the optimum is 34.56 %."""
    trace = first_half(conversation(partial=True))
    found = replay(with_hints(trace, share), policy, [10_000])
    assert 100 * found.hit_blocks / found.block_accesses == pytest.approx(ratio, abs=0.005)
