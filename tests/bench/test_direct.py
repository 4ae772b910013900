"""The cost of direct tiers beside the frames that they need: CPU time of the whole process."""

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

BLOCKS, ROUNDS = 32, 60  # 64 MiB: four calls of a tier
BAR = 1.05


class LackingTier(PreallocatedTier):
    """Reports to lack every block, so that every store writes."""

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [False] * len(keys)


def cpu_seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def test_direct_tiers_cost_little_more_cpu_than_framed_alone() -> None:
    keys = keys_of("bench", BLOCKS)
    blocks = [memoryview(block_of(key, BLOCK_NBYTES)) for key in keys]
    into = [memoryview(bytearray(b"\1" * BLOCK_NBYTES)) for _ in keys]
    framed = Framed(LackingTier(keys, BLOCK_NBYTES), block_nbytes=BLOCK_NBYTES)
    tier = DirectTier(
        framed, name="t1", namespace=b"", block_nbytes=BLOCK_NBYTES, deadline_s=LONG, calls=1
    )
    with DirectTiers([tier], profile="bench", block_nbytes=BLOCK_NBYTES) as direct:
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "store": (lambda: direct.store(keys, blocks), lambda: framed.store(keys, blocks)),
            "load": (lambda: direct.load(keys, into), lambda: framed.load(keys, into)),
        }
        for name, calls in pairs.items():
            took: tuple[list[float], list[float]] = ([], [])
            for turn in range(ROUNDS):
                for at in (0, 1) if turn % 2 else (1, 0):
                    took[at].append(cpu_seconds(calls[at]))
            # The best round is the one that other processes disturbed least.
            best = min(took[0]) / min(took[1])
            ratios = [direct_s / framed_s for direct_s, framed_s in zip(*took, strict=True)]
            gigabytes = BLOCKS * BLOCK_NBYTES / 1e9
            print(
                f"{name}: direct / framed: best rounds {best:.3f}, quartiles of rounds "
                f"{[round(each, 3) for each in statistics.quantiles(ratios, n=4)]}; "
                f"framed alone {min(took[1]) / gigabytes:.3f} CPU seconds per GB"
            )
            assert best <= BAR
    assert into == blocks
