"""The bars of `kvcache bench` on any machine: ratios and costs within one run."""

import pytest

pytest.importorskip("numba")

from kvcache.cli import bench

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("threads", [1, 2])
def test_copies_reach_the_speed_of_memcpy(threads: int) -> None:
    found = bench.copies(threads, blocks=256, rounds=15)
    print(found)
    assert found["store_gib_s"] >= 0.95 * found["memcpy_gib_s"]
    assert found["load_gib_s"] >= 0.95 * found["memcpy_gib_s"]
    assert found["cold_store_gib_s"] >= 0.8 * found["memcpy_gib_s"]


def test_bookkeeping_costs_microseconds_and_is_linear() -> None:
    found = bench.bookkeeping(rounds=15)
    print(found)
    assert found["match_us_per_block"] * bench.PROMPT <= 500
    assert found["match_4x_us_per_block"] <= 1.5 * found["match_us_per_block"]
    assert found["reserve_us_per_block"] <= 3


def test_import_takes_at_most_100_ms() -> None:
    found = bench.import_ms(rounds=9)
    print(found)
    assert found <= 100
