"""Made-up traffic is the same for the same seed, is a trace like any other, and is what it says."""

from collections import Counter

import pytest

from kvcache.replay.belady import optimum
from kvcache.replay.generators import GENERATORS, generate
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Trace

each = pytest.mark.parametrize("name", GENERATORS)


def found(trace: Trace, policy: str, capacity: int) -> float:
    return replay(trace, policy, [capacity]).hit_blocks / len(trace.blocks)


@each
def test_a_seed_gives_one_trace(name: str) -> None:
    assert generate(name, 500, seed=4) == generate(name, 500, seed=4)
    assert generate(name, 500, seed=4) != generate(name, 500, seed=5)
    assert len(generate(name, 500)) == 500


@each
def test_a_block_stands_for_all_before_it(name: str) -> None:
    trace = generate(name, 500, partial=True)
    before: dict[int, int] = {}
    for tokens, chain in zip(trace.tokens, trace.chains(), strict=True):
        assert len(chain) == -(-tokens // trace.block_tokens)
        for parent, block in zip([-1, *chain], chain, strict=False):
            assert before.setdefault(block, parent) == parent


@each
def test_there_is_something_to_find_and_something_to_lose(name: str) -> None:
    trace = generate(name, 3000)
    most = found(trace, "lru", trace.distinct)
    assert most > 0.2
    assert found(trace, "lru", trace.distinct // 20) < 0.95 * most


def test_a_cycle_is_nothing_to_lru() -> None:
    trace = generate("cyclic", 4500)
    half = trace.distinct // 2
    assert found(trace, "lru", half) < 0.01
    assert optimum(trace, half).hit_blocks / len(trace.blocks) > 0.25


def test_taste_changes() -> None:
    trace = generate("shift", 4000)
    parts = [Counter[int](), Counter[int](), Counter[int]()]  # of five minutes each
    for time_s, chain in zip(trace.times_s, trace.chains(), strict=True):
        if time_s < 900:
            parts[int(time_s // 300)].update(chain[:1])
    first, same, other = ({block for block, _ in part.most_common(20)} for part in parts)
    assert len(first & same) >= 5
    assert len(first & other) <= 2
