"""The cost of direct tiers beside the frames that they need: CPU time of the whole process.

The first bar counts the work that a call adds, with blocks so small that caches stay warm. Blocks
of 2 MiB flush the caches of a core, and the same work then takes several times as long; the
second bar is for that, and depends on what else the machine does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import pytest

from kvcache.lower.direct import DirectTiers
from kvcache.lower.direct_tier import DirectTier
from kvcache.testing import block_of, keys_of
from kvcache.tiers.framed import Framed
from tests.bench.test_framed import BLOCK_NBYTES, PreallocatedTier
from tests.support.stack_under_test import LONG

pytestmark = pytest.mark.bench

BLOCKS, ROUNDS = 32, 60
CALLS = 4  # of a tier for these blocks, 16 MiB each
ADDED_BAR = 0.05  # of the CPU time of Framed alone
COLD_BAR = 1.15


class LackingTier(PreallocatedTier):
    """Reports to lack every block, so that every store writes."""

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [False] * len(keys)


def cpu_seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def compare(block_nbytes: int) -> dict[str, tuple[float, float, float]]:
    """Return, for a store and a load, CPU seconds of direct tiers, of Framed, and their ratio.

    The seconds are those of the best round, which other processes disturbed least; the ratio is
    the median of the rounds.
    """
    keys = keys_of("bench", BLOCKS)
    blocks = [memoryview(block_of(key, block_nbytes)) for key in keys]
    into = [memoryview(bytearray(b"\1" * block_nbytes)) for _ in keys]
    inner = LackingTier(keys, block_nbytes)
    inner.call_nbytes = BLOCKS // CALLS * block_nbytes
    framed = Framed(inner, block_nbytes=block_nbytes)
    tier = DirectTier(
        framed,
        name="t1",
        namespace=b"",
        block_nbytes=block_nbytes,
        deadline_s=LONG,
        calls=1,
        piece_nbytes=inner.call_nbytes,
    )
    found = {}
    with DirectTiers([tier], profile="bench", block_nbytes=block_nbytes) as direct:
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "store": (lambda: direct.store(keys, blocks), lambda: framed.store(keys, blocks)),
            "load": (lambda: direct.load(keys, into), lambda: framed.load(keys, into)),
        }
        for name, calls in pairs.items():
            took: tuple[list[float], list[float]] = ([], [])
            for turn in range(ROUNDS):
                for at in (0, 1) if turn % 2 else (1, 0):
                    took[at].append(cpu_seconds(calls[at]))
            ratio = statistics.median(a / b for a, b in zip(*took, strict=True))
            found[name] = (min(took[0]), min(took[1]), ratio)
    assert into == blocks
    return found


def test_direct_tiers_cost_little_more_cpu_than_framed_alone() -> None:
    small, large = compare(4 << 10), compare(BLOCK_NBYTES)
    for name in small:
        added = (small[name][0] - small[name][1]) / large[name][1]
        gigabytes = BLOCKS * BLOCK_NBYTES / 1e9
        print(
            f"{name}: direct tiers add {(small[name][0] - small[name][1]) / CALLS * 1e6:.0f} us to "
            f"a call, {added:.1%} of Framed alone ({large[name][1] / gigabytes:.3f} CPU seconds "
            f"per GB); with cold caches the ratio is {large[name][2]:.3f}"
        )
        assert added <= ADDED_BAR
        assert large[name][2] <= COLD_BAR
