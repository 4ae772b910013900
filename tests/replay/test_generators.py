"""Generated traffic: the same for the same seed, a valid trace, and with the described reuse."""

from collections import Counter

import pytest

from kvcache.replay.belady import optimum
from kvcache.replay.generators import GENERATORS, generate
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Trace

each_name = pytest.mark.parametrize("name", GENERATORS)


def hit_ratio(trace: Trace, policy: str, capacity: int) -> float:
    return replay(trace, policy, [capacity]).hit_blocks / len(trace.blocks)


@each_name
def test_generate_with_one_seed_is_repeatable(name: str) -> None:
    assert generate(name, 500, seed=4) == generate(name, 500, seed=4)
    assert generate(name, 500, seed=4) != generate(name, 500, seed=5)
    assert len(generate(name, 500)) == 500


@each_name
def test_generated_block_has_one_parent(name: str) -> None:
    trace = generate(name, 500, partial=True)
    parents: dict[int, int] = {}
    for tokens, chain in zip(trace.tokens, trace.chains(), strict=True):
        assert len(chain) == -(-tokens // trace.block_tokens)
        for parent, block in zip([-1, *chain], chain, strict=False):
            assert parents.setdefault(block, parent) == parent


@each_name
def test_generated_traffic_has_hits_that_a_small_cache_loses(name: str) -> None:
    trace = generate(name, 3000)
    highest = hit_ratio(trace, "lru", trace.distinct)
    assert highest > 0.2
    assert hit_ratio(trace, "lru", trace.distinct // 20) < 0.95 * highest


def test_cyclic_traffic_has_no_hits_with_lru() -> None:
    trace = generate("cyclic", 4500)
    half = trace.distinct // 2
    assert hit_ratio(trace, "lru", half) < 0.01
    assert optimum(trace, half).hit_blocks / len(trace.blocks) > 0.25


def test_shift_traffic_changes_the_popular_documents() -> None:
    trace = generate("shift", 4000)
    parts = [Counter[int](), Counter[int](), Counter[int]()]  # of five minutes each
    for time_s, chain in zip(trace.times_s, trace.chains(), strict=True):
        if time_s < 900:
            parts[int(time_s // 300)].update(chain[:1])
    first, same, other = ({block for block, _ in part.most_common(20)} for part in parts)
    assert len(first & same) >= 5
    assert len(first & other) <= 2
