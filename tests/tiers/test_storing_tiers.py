"""Every tier that stores blocks, below a stack: with injected faults in any order, and for long.

The machine is that of tests/lower/test_faults.py, and the traffic that of
tests/core/test_endurance.py; here the blocks are in the real tier, bare and in frames.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import cache
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
    """Yield each kind of tier with its form."""
    for name, kind in KINDS.items():
        marks = [pytest.mark.server] if kind.server else []
        for form in ("framed",) if kind.framed else ("bare", "framed"):
            yield pytest.param((name, form), marks=marks, id=f"{name}-{form}")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], OpenTier]]:
    """Return a function that starts what a kind of tier needs, once."""
    with ExitStack() as running:
        yield cache(
            lambda kind: running.enter_context(KINDS[kind].start(tmp_path_factory.mktemp(kind)))
        )


@pytest.fixture(params=cases())
def open_tier(request: pytest.FixtureRequest, start: Callable[[str], OpenTier]) -> OpenTier:
    """Return a function that opens the tier for blocks of a number of bytes."""
    kind, form = request.param
    open_bare = start(kind)
    if form == "bare":
        return open_bare
    return lambda nbytes: Framed(open_bare(frame_nbytes(nbytes)), block_nbytes=nbytes)


def test_stack_with_injected_faults_keeps_its_invariants(open_tier: OpenTier) -> None:
    with closing(open_tier(PAGE)) as inner:

        class FaultsOverTier(Faults):
            def new_tier(self) -> tuple[StoringTier, bytes]:
                return StoringTier(inner), next(NAMESPACES).to_bytes(32)

        run_state_machine_as_test(
            FaultsOverTier,
            settings=settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None),
        )


@pytest.mark.parametrize("lookup", ["ask", "load"])
def test_long_traffic_leaves_nothing_behind(
    open_tier: OpenTier, lookup: Literal["ask", "load"], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "kvcache")  # spares keeping a thousand warnings in memory
    threads = set(threading.enumerate())
    inner: Tier = open_tier(NBYTES)
    with closing(inner):
        traffic = Traffic(Options(lookup=lookup), inner, TURNS)
        for number in range(ROUNDS):
            traffic.round(number)
        check_nothing_is_left(traffic)
        traffic.stack.close()
    for thread in set(threading.enumerate()) - threads:
        thread.join(LONG)
    assert set(threading.enumerate()) <= threads
