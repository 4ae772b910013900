"""Tiers that fail or hang: bounded calls, and no wrong byte in the host pool."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import sglang_pools as pools
from tests.support.failing_parts import COMMON_FAULTS
from tests.support.sglang_tiers import OpenedFaultyTier, faulty

pytestmark = pytest.mark.sglang

PAGES = 4
SHORT = {"deadline_s": 0.2}


def open_faulty(**options: Any) -> tuple[Any, Any, OpenedFaultyTier]:
    """Return a backend, its host pool and its tier."""
    pool = pools.mha_pool()
    storage = pools.config({"tiers": [faulty(**options)], "identity": "tests"})
    return pools.open_backend(storage, pool), pool, OpenedFaultyTier.opened[-1]


def all_bytes(pool: Any) -> list[bytes]:
    return [pools.page_bytes(pool, page) for page in range(pools.PAGES)]


@pytest.mark.parametrize("fault", [each for each in COMMON_FAULTS if each != "decline"])
def test_faulty_tier_gives_right_bytes_or_none(fault: str) -> None:
    backend, pool, tier = open_faulty()
    keys, at = pools.page_keys(PAGES), pools.indices(pool, range(PAGES))
    pools.fill(pool, 1)
    wanted = all_bytes(pool)
    assert all(backend.batch_set_v1(keys, at))
    pools.fill(pool, 2)
    others = all_bytes(pool)
    tier.fault = fault
    assert 0 <= backend.batch_exists(keys) <= PAGES
    loaded = backend.batch_get_v1(keys, at)
    assert len(loaded) == PAGES
    for page, done in enumerate(loaded):
        assert not done or pools.page_bytes(pool, page) == wanted[page]
    assert all_bytes(pool)[PAGES:] == others[PAGES:]


def test_corrupt_block_is_not_loaded() -> None:
    backend, pool, tier = open_faulty()
    keys, at = pools.page_keys(PAGES), pools.indices(pool, range(PAGES))
    assert all(backend.batch_set_v1(keys, at))
    name = list(tier.held)[3]  # V of page 1
    block = bytearray(tier.held[name])
    block[-1] ^= 1
    tier.held[name] = bytes(block)
    assert backend.batch_get_v1(keys, at) == [True, False, True, True]


def test_swapped_blocks_are_not_loaded() -> None:
    backend, pool, tier = open_faulty()
    keys, at = pools.page_keys(PAGES), pools.indices(pool, range(PAGES))
    pools.fill(pool, 1)
    assert all(backend.batch_set_v1(keys, at))
    first, second = list(tier.held)[:2]
    tier.held[first], tier.held[second] = tier.held[second], tier.held[first]
    assert backend.batch_get_v1(keys, at) == [False, True, True, True]


def test_load_from_a_hanging_tier_returns_and_writes_nothing_later() -> None:
    backend, pool, tier = open_faulty(**SHORT)
    keys, at = pools.page_keys(PAGES), pools.indices(pool, range(PAGES))
    pools.fill(pool, 1)
    assert all(backend.batch_set_v1(keys, at)) or pytest.skip("the machine is too busy")
    tier.gate.clear()
    assert backend.batch_get_v1(keys, at) == [False] * PAGES  # returns while the tier hangs
    assert tier.waiting.acquire(timeout=60)
    pools.fill(pool, 2)
    wanted = all_bytes(pool)
    tier.gate.set()
    backend.close()  # waits for the late call
    assert len(tier.read) == 2 * PAGES
    assert all_bytes(pool) == wanted


def test_store_to_a_hanging_tier_returns_and_stores_no_later_bytes() -> None:
    backend, pool, tier = open_faulty(**SHORT)
    keys, at = pools.page_keys(PAGES), pools.indices(pool, range(PAGES))
    pools.fill(pool, 1)
    wanted = all_bytes(pool)[:PAGES]
    tier.gate.clear()
    assert backend.batch_set_v1(keys, at) == [False] * PAGES
    assert tier.waiting.acquire(timeout=60)
    pools.fill(pool, 2)
    tier.gate.set()
    loaded = backend.batch_get_v1(keys, at)
    for page, done in enumerate(loaded):
        assert not done or pools.page_bytes(pool, page) == wanted[page]
    backend.close()


def test_lookup_in_a_hanging_tier_returns_nothing() -> None:
    backend, _, tier = open_faulty(**SHORT)
    keys = pools.page_keys(PAGES)
    tier.gate.clear()
    assert backend.batch_exists(keys) == 0
    tier.gate.set()
    backend.close()


def test_failing_tier_is_not_called_after_three_failures() -> None:
    backend, pool, tier = open_faulty()
    keys, at = pools.page_keys(1), pools.indices(pool, [0])
    assert backend.batch_set_v1(keys, at) == [True]
    tier.fault = "raise"
    for _ in range(3):
        assert backend.batch_get_v1(keys, at) == [False]
    called = len(tier.calls)
    assert backend.batch_get_v1(keys, at) == [False]
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, at) == [False]
    assert len(tier.calls) == called


def test_page_is_loaded_from_the_next_tier_if_the_first_fails() -> None:
    pool = pools.mha_pool()
    tables = [faulty("near"), faulty("far")]
    backend = pools.open_backend(pools.config({"tiers": tables, "identity": "tests"}), pool)
    near, far = OpenedFaultyTier.opened[-2:]
    keys, at = pools.page_keys(PAGES), pools.indices(pool, range(PAGES))
    pools.fill(pool, 1)
    wanted = all_bytes(pool)
    assert all(backend.batch_set_v1(keys, at))
    near.held.clear()
    pools.fill(pool, 2)
    assert backend.batch_exists(keys) == PAGES
    assert backend.batch_get_v1(keys, at) == [True] * PAGES
    assert all_bytes(pool)[:PAGES] == wanted[:PAGES]
    near.fault = "raise"
    assert backend.batch_get_v1(keys, at) == [True] * PAGES
    assert far.read


def test_tier_that_is_not_asked_misses_a_page_once() -> None:
    """With ``lookup = "load"`` the load is the question."""
    backend, pool, tier = open_faulty(lookup="load")
    keys, at = pools.page_keys(PAGES), pools.indices(pool, range(PAGES))
    assert backend.batch_exists(keys) == PAGES
    assert tier.calls == []
    assert backend.batch_get_v1(keys, at) == [False] * PAGES
    assert backend.batch_exists(keys) == 0
    assert all(backend.batch_set_v1(keys, at))
    assert backend.batch_exists(keys) == PAGES
    assert backend.batch_get_v1(keys, at) == [True] * PAGES
