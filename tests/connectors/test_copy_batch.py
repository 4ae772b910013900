"""Which batches have all of the host's side in pinned memory."""

from __future__ import annotations

from random import Random

import pytest

pytest.importorskip("numpy")

import numpy as np

from kvcache.connectors.transfer.base import Integers
from kvcache.connectors.transfer.copy_batch import PinnedRanges


def addresses(*values: int) -> Integers:
    return np.array(values, dtype=np.int64)


def test_batch_has_a_direction_where_every_run_of_one_side_is_pinned() -> None:
    pinned, ten = PinnedRanges(), addresses(10, 10)
    assert pinned.batch(addresses(100, 110), addresses(0, 10), ten).direction is None
    pinned.add(110, 10)
    assert pinned.batch(addresses(100, 110), addresses(0, 10), ten).direction is None
    pinned.add(100, 10)  # adjacent, so that a run may lie in both
    assert pinned.batch(addresses(100, 110), addresses(0, 10), ten).direction == "store"
    assert pinned.batch(addresses(0, 10), addresses(105, 105), ten).direction == "load"
    assert pinned.batch(addresses(0, 10), addresses(100, 111), ten).direction is None
    assert pinned.batch(addresses(0, 10), addresses(99, 100), ten).direction is None
    pinned.remove(100)
    assert pinned.batch(addresses(0, 10), addresses(105, 105), ten).direction is None
    assert pinned.batch(addresses(0), addresses(110), ten[:1]).direction == "load"
    assert pinned.batch(addresses(), addresses(), addresses()).direction is None


@pytest.mark.parametrize("seed", range(20))
def test_ranges_after_random_additions_and_removals_contain_the_pinned_memory(seed: int) -> None:
    random, pinned = Random(seed), PinnedRanges()
    extents: dict[int, int] = {}  # bytes by address
    for _ in range(60):
        begin = 10 * random.randrange(12)
        if begin in extents:
            pinned.remove(begin)
            del extents[begin]
        else:
            extents[begin] = random.choice([10, 10, 7])
            pinned.add(begin, extents[begin])
        pinned.remove(5)  # there is no such extent
        memory = {byte for at, nbytes in extents.items() for byte in range(at, at + nbytes)}
        for _ in range(8):
            at, nbytes = random.randrange(-5, 125), random.randrange(1, 25)
            other = at + random.randrange(-3, 4)
            batch = pinned.batch(addresses(at, other), addresses(1000, 1000), addresses(nbytes, 2))
            held = set(range(min(at, other), max(at + nbytes, other + 2))) <= memory
            assert batch.direction == ("store" if held else None)
