"""The v2 calls, for models with several pools: Mamba, sliding windows, DSA, DeepSeek V4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import sglang_pools as pools
from tests.support.sglang_tiers import OpenedFaultyTier, disk, faulty

pytestmark = pytest.mark.sglang

from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    count_pool_hits,
)

PAGES = 6
ALL, TRAILING = PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES


def transfer(
    name: PoolName, pool: Any, keys: list[str], at: list[int], policy: PoolHitPolicy = ALL
) -> PoolTransfer:
    """Return the transfer of the pages ``at`` of a pool, under ``keys``."""
    return PoolTransfer(
        name=name, host_indices=pools.indices(pool, at), keys=keys, hit_policy=policy
    )


def asked(name: PoolName, count: int, policy: PoolHitPolicy) -> PoolTransfer:
    """Return what SGLang asks of a pool that needs ``count`` pages at the end of a prefix."""
    return PoolTransfer(name=name, keys=["?"] * count, hit_policy=policy)


SIDES: dict[str, tuple[PoolName, Callable[[Any], Any], PoolHitPolicy]] = {
    "mamba": (PoolName.MAMBA, lambda anchor: pools.mamba_pool(), TRAILING),
    "window": (PoolName.SWA, lambda anchor: pools.mha_pool("page_first"), TRAILING),
    "indexer": (PoolName.INDEXER, pools.indexer_pool, ALL),
    "compressed": (PoolName.DEEPSEEK_V4_C4, lambda anchor: pools.compressed_pool(), ALL),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_hybrid_storage_loads_the_bytes_of_both_pools(tmp_path: Path, side: str, mla: bool) -> None:
    name, make, policy = SIDES[side]
    anchor = pools.mla_pool() if mla else pools.mha_pool()
    pool = make(anchor)
    storage = pools.config({"tiers": [disk(tmp_path)], "identity": "tests"}, mla=mla)
    backend = pools.open_backend(storage, anchor, {name: pool})
    keys, at = pools.page_keys(PAGES), list(range(PAGES))
    pools.fill(pool, 1)
    pools.fill(anchor, 2)
    wanted = [pools.page_bytes(pool, page) for page in at]
    of_anchor = [pools.page_bytes(anchor, page) for page in at]
    assert backend.batch_set_v2([transfer(name, pool, keys, at, policy)]) == {name: [True] * PAGES}
    assert backend.batch_set_v1(keys, pools.indices(anchor, at)) == [True] * PAGES
    pools.fill(pool, 3)
    pools.fill(anchor, 4)
    result = backend.batch_exists_v2(keys, [asked(name, 1, policy)])
    assert (result.kv_hit_pages, result.extra_pool_hit_pages) == (
        PAGES, {PoolName.KV: PAGES, name: PAGES},
    )  # fmt: skip
    elsewhere = [page + 10 for page in at]
    loads = [
        transfer(PoolName.KV, anchor, keys, elsewhere),
        transfer(name, pool, keys, elsewhere, policy),
    ]
    loaded = backend.batch_get_v2(loads)
    assert loaded == {PoolName.KV: [True] * PAGES, name: [True] * PAGES}
    assert count_pool_hits(loaded)[name] == PAGES
    assert [pools.page_bytes(pool, page) for page in elsewhere] == wanted
    assert [pools.page_bytes(anchor, page) for page in elsewhere] == of_anchor
    backend.close()


def hybrid(name: PoolName, make: Any, **of_config: Any) -> tuple[Any, Any, Any]:
    """Return a backend over a tier in memory, and its two pools."""
    anchor = pools.mha_pool()
    side = make(anchor)
    storage = pools.config({"tiers": [faulty()], "identity": "tests"}, **of_config)
    return pools.open_backend(storage, anchor, {name: side}), anchor, side


def test_hybrid_storage_finds_the_prefixes_that_end_in_a_state() -> None:
    backend, anchor, side = hybrid(PoolName.MAMBA, lambda anchor: pools.mamba_pool())
    keys = pools.page_keys(PAGES)
    assert all(backend.batch_set_v1(keys, pools.indices(anchor, range(PAGES))))
    for page in (1, 4):
        states = transfer(PoolName.MAMBA, side, [keys[page]], [page], TRAILING)
        assert backend.batch_set_v2([states]) == {PoolName.MAMBA: [True]}
    result = backend.batch_exists_v2(keys, [asked(PoolName.MAMBA, 1, TRAILING)])
    assert result.restorable_prefix_pages == [2, 5]
    assert result.kv_hit_pages == 5
    assert result.extra_pool_hit_pages == {PoolName.KV: PAGES, PoolName.MAMBA: 5}
    nothing = backend.batch_exists_v2(keys[:1], [asked(PoolName.MAMBA, 1, TRAILING)])
    assert (nothing.kv_hit_pages, nothing.restorable_prefix_pages) == (0, [])


def test_hybrid_storage_needs_every_page_of_an_indexer() -> None:
    backend, anchor, side = hybrid(PoolName.INDEXER, pools.indexer_pool)
    keys = pools.page_keys(PAGES)
    assert all(backend.batch_set_v1(keys, pools.indices(anchor, range(PAGES))))
    for first, end in ((0, 3), (4, 6)):
        pages = transfer(PoolName.INDEXER, side, keys[first:end], list(range(first, end)))
        assert all(backend.batch_set_v2([pages])[PoolName.INDEXER])
    result = backend.batch_exists_v2(keys, [asked(PoolName.INDEXER, 0, ALL)])
    assert (result.kv_hit_pages, result.restorable_prefix_pages) == (3, [1, 2, 3])


def test_hybrid_storage_without_kv_pages_finds_nothing() -> None:
    backend, _, _ = hybrid(PoolName.MAMBA, lambda anchor: pools.mamba_pool())
    result = backend.batch_exists_v2(pools.page_keys(2), [asked(PoolName.MAMBA, 1, TRAILING)])
    assert (result.kv_hit_pages, result.extra_pool_hit_pages) == (0, {})
    assert result.restorable_prefix_pages == []


def test_hybrid_storage_of_a_pool_without_memory_is_found_by_its_other_pools(
    tmp_path: Path,
) -> None:
    anchor, side, name = pools.logical_pool(), pools.compressed_pool(), PoolName.DEEPSEEK_V4_C4
    storage = pools.config({"tiers": [disk(tmp_path)], "identity": "tests"}, mla=True)
    backend = pools.open_backend(storage, anchor, {name: side})
    keys = pools.page_keys(4)
    assert backend.batch_set_v1(keys, pools.indices(anchor, range(4))) == [True] * 4
    assert all(backend.batch_set_v2([transfer(name, side, keys[:3], [0, 1, 2])])[name])
    result = backend.batch_exists_v2(keys, [asked(name, 0, ALL)])
    assert (result.kv_hit_pages, result.extra_pool_hit_pages[PoolName.KV]) == (3, 4)
    assert backend.batch_get_v1(keys[:3], pools.indices(anchor, range(3))) == [True] * 3
    backend.close()


def test_hybrid_storage_names_the_kv_page_before_a_state_as_its_parent() -> None:
    backend, anchor, side = hybrid(PoolName.MAMBA, lambda anchor: pools.mamba_pool())
    keys, tier = pools.page_keys(2), OpenedFaultyTier.opened[-1]
    assert all(backend.batch_set_v1(keys[:1], pools.indices(anchor, [0])))
    last = list(tier.held)[-1]
    info = HiCacheStorageExtraInfo(prefix_keys=keys[:1])
    states = transfer(PoolName.MAMBA, side, keys[1:], [1], TRAILING)
    assert all(backend.batch_set_v2([states], info)[PoolName.MAMBA])
    assert tier.parents[-1] == last


def test_hybrid_storage_of_states_is_written_by_every_rank() -> None:
    """Mamba's states differ by rank even where KV is equal on all ranks (Kimi)."""
    tier = faulty(shared="states")
    keys, opened = pools.page_keys(1), []
    for rank in range(2):
        anchor, side = pools.mla_pool(), pools.mamba_pool()
        storage = pools.config({"tiers": [tier], "identity": "tests"}, mla=True, tp=(rank, 2))
        backend = pools.open_backend(storage, anchor, {PoolName.MAMBA: side})
        pools.fill(side, seed=rank)
        wanted = pools.page_bytes(side, 0)
        states = transfer(PoolName.MAMBA, side, keys, [0], TRAILING)
        assert backend.batch_set_v2([states]) == {PoolName.MAMBA: [True]}
        opened.append((backend, side, wanted))
    for backend, side, wanted in opened:
        loaded = backend.batch_get_v2([transfer(PoolName.MAMBA, side, keys, [5], TRAILING)])
        assert loaded == {PoolName.MAMBA: [True]}
        assert pools.page_bytes(side, 5) == wanted


def test_hybrid_storage_of_a_trailing_transfer_of_wrong_length_loads_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend, _, side = hybrid(PoolName.MAMBA, lambda anchor: pools.mamba_pool())
    late = transfer(PoolName.MAMBA, side, pools.page_keys(2), [0], TRAILING)
    unknown = PoolTransfer(name=PoolName.SWA, keys=pools.page_keys(1))
    results = backend.batch_get_v2([late, unknown])
    assert results == {PoolName.MAMBA: [False, False], PoolName.SWA: [False]}
    assert caplog.text.count("is unknown, or has other memory") == 2


def test_hybrid_storage_declines_a_late_pool_of_larger_pages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend, _, _ = hybrid(PoolName.MAMBA, lambda anchor: pools.mamba_pool())
    large = pools.mha_pool("page_first", v_head_dim=256)
    backend.register_mem_host_pool_v2(large, PoolName.SWA)
    assert "its pages are not stored" in caplog.text
    pages = transfer(PoolName.SWA, large, pools.page_keys(1), [0])
    assert backend.batch_set_v2([pages]) == {PoolName.SWA: [False]}


def test_hybrid_storage_takes_a_late_pool_of_smaller_pages() -> None:
    backend, _, _ = hybrid(PoolName.MAMBA, lambda anchor: pools.mamba_pool())
    small = pools.mha_pool("page_first", v_head_dim=4)
    backend.register_mem_host_pool_v2(small, PoolName.SWA)
    pages = transfer(PoolName.SWA, small, pools.page_keys(1), [0])
    assert backend.batch_set_v2([pages]) == {PoolName.SWA: [True]}


def test_hybrid_storage_of_a_layout_without_addresses_is_refused_at_the_start() -> None:
    anchor = pools.mla_pool("layer_first")
    storage = pools.config({"tiers": [faulty()], "identity": "tests"}, mla=True)
    with pytest.raises(ValueError, match="host pool 'indexer' in layout 'layer_first'"):
        pools.open_backend(storage, anchor, {PoolName.INDEXER: pools.indexer_pool(anchor)})
