"""Every tier that stores blocks, below a stack: with injected faults in any order, and for long.

The machine is that of tests/lower/test_faults.py, and the traffic that of
tests/core/test_endurance.py; here the blocks are in the real tier, bare and in frames.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvcache.slab import PAGE
from kvcache.tier import Tier
from kvcache.tiers.framed import Framed, frame_nbytes
from tests.core.test_endurance import NBYTES, Options, Traffic, check_nothing_is_left
from tests.lower.test_faults import Faults
from tests.support.failing_parts import StoringTier
from tests.support.stack_under_test import LONG
from tests.support.storing_tiers import KINDS, OpenTier

EXAMPLES = int(os.environ.get("KVCACHE_MACHINE_EXAMPLES", "40"))
ROUNDS, TURNS = 3, 60
NAMESPACES = count(1)


def cases() -> Iterator[object]:
    """Yield each kind of tier."""
    for name, kind in KINDS.items():
        yield pytest.param(name, marks=[pytest.mark.server] if kind.server else [])


@pytest.fixture(scope="module", params=cases())
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def open_tier(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenTier]:
    with KINDS[kind].start(tmp_path_factory.mktemp(kind)) as open_tier:
        yield open_tier


@pytest.fixture(params=["bare", "framed"])
def open_for_blocks(request: pytest.FixtureRequest, kind: str, open_tier: OpenTier) -> OpenTier:
    """Return a function that opens the tier for blocks of a number of bytes."""
    if request.param == "bare":
        if KINDS[kind].framed:
            pytest.skip("this tier must be in frames")
        return open_tier
    return lambda nbytes: Framed(open_tier(frame_nbytes(nbytes)), block_nbytes=nbytes)


def test_stack_with_injected_faults_keeps_its_invariants(open_for_blocks: OpenTier) -> None:
    with closing(open_for_blocks(PAGE)) as inner:

        class FaultsOverTier(Faults):
            def new_tier(self) -> tuple[StoringTier, bytes]:
                return StoringTier(inner), next(NAMESPACES).to_bytes(32)

        run_state_machine_as_test(
            FaultsOverTier,
            settings=settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None),
        )


@pytest.mark.parametrize("lookup", ["ask", "load"])
def test_long_traffic_leaves_nothing_behind(
    open_for_blocks: OpenTier, lookup: Literal["ask", "load"], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "kvcache")  # spares keeping a thousand warnings in memory
    threads = set(threading.enumerate())
    inner: Tier = open_for_blocks(NBYTES)
    with closing(inner):
        traffic = Traffic(Options(lookup=lookup), inner, TURNS)
        for number in range(ROUNDS):
            traffic.round(number)
        check_nothing_is_left(traffic)
        traffic.stack.close()
    for thread in set(threading.enumerate()) - threads:
        thread.join(LONG)
    assert set(threading.enumerate()) <= threads
