"""The bars that `kvcache bench` has to clear on any machine: ratios and costs within one run."""

import pytest

pytest.importorskip("numba")

from kvcache.cli import bench

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_move_as_fast_as_memory(threads: int) -> None:
    found = bench.copies(threads, blocks=256, rounds=15)
    print(found)
    assert found["store_gib_s"] >= 0.95 * found["memcpy_gib_s"]
    assert found["load_gib_s"] >= 0.95 * found["memcpy_gib_s"]
    assert found["cold_store_gib_s"] >= 0.8 * found["memcpy_gib_s"]


def test_bookkeeping_is_small_and_linear() -> None:
    found = bench.bookkeeping(rounds=15)
    print(found)
    assert found["match_us_per_block"] * bench.PROMPT <= 500
    assert found["match_4x_us_per_block"] <= 1.5 * found["match_us_per_block"]
    assert found["reserve_us_per_block"] <= 3


def test_import_is_quick() -> None:
    found = bench.import_ms(rounds=9)
    print(found)
    assert found <= 100
