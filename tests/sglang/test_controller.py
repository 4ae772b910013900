"""SGLang's own cache controller calls the backend: its hashes, its batches, its order of calls."""

from __future__ import annotations

from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import sglang_pools as pools
from tests.support.sglang_tiers import OpenedFaultyTier, disk, faulty

pytestmark = pytest.mark.sglang

from sglang.srt.managers.cache_controller import (  # noqa: E402
    HiCacheController,
    PrefetchOperation,
    StorageOperation,
)
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.hybrid_cache import hybrid_cache_controller as hybrid  # noqa: E402
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry  # noqa: E402

PAGES = 10
TOKENS = list(range(PAGES * pools.PAGE_TOKENS))


def controller(backend: Any, pool: Any) -> Any:
    """Return SGLang's controller with the parts that transfers to a storage use."""
    made = HiCacheController.__new__(HiCacheController)
    set_up(made, backend, pool)
    return made


def set_up(made: Any, backend: Any, pool: Any) -> None:
    """Set what transfers to a storage use; the other parts of a controller need a GPU."""
    made.storage_backend, made.page_size = backend, pool.page_size
    made.mem_pool_host = made.storage_host_pool = pool
    made.page_get_func, made.page_set_func = made._page_get_zero_copy, made._page_set_zero_copy
    made.prefetch_sync_queue = Queue()


def backed_up(made: Any, pool: Any, tokens: list[int]) -> StorageOperation:
    """Write pages to the storage as SGLang's backup thread does."""
    hashes, _ = query(made, tokens)
    pages = len(tokens) // pool.page_size
    operation = StorageOperation(
        pools.indices(pool, range(pages)), tokens, hash_value=hashes.all_hash_values, prefix_keys=[]
    )
    made._page_backup(operation)
    return operation


def query(made: Any, tokens: list[int]) -> tuple[Any, int]:
    """Ask for the pages of a prompt as SGLang's prefetch thread does."""
    operation = PrefetchOperation("request", tokens, None, [])
    operation.hash_value, count = made._storage_hit_query(operation)
    return operation, count


@pytest.fixture(params=pools.LAYOUTS)
def pool(request: pytest.FixtureRequest) -> Any:
    return pools.mha_pool(request.param)


def test_controller_prefetches_the_pages_that_it_backed_up(tmp_path: Path, pool: Any) -> None:
    storage = pools.config({"tiers": [disk(tmp_path)], "identity": "tests"})
    backend = pools.open_backend(storage, pool)
    made = controller(backend, pool)
    pools.fill(pool, 1)
    wanted = [pools.page_bytes(pool, page) for page in range(PAGES)]
    assert backed_up(made, pool, TOKENS).completed_tokens == len(TOKENS)
    pools.fill(pool, 2)
    operation, count = query(made, [*TOKENS, *TOKENS])
    assert count == len(TOKENS)  # the second half is another prompt's
    operation.host_indices = pools.indices(pool, range(12, 12 + PAGES))
    assert made._page_transfer(operation) == PAGES
    assert [pools.page_bytes(pool, page) for page in range(12, 12 + PAGES)] == wanted
    assert made.prefetch_sync_queue.get().completed_tokens == len(TOKENS)
    backend.close()


def test_controller_prefetches_the_pages_before_one_that_fails(pool: Any) -> None:
    storage = pools.config({"tiers": [faulty()], "identity": "tests"})
    made = controller(pools.open_backend(storage, pool), pool)
    tier = OpenedFaultyTier.opened[-1]
    backed_up(made, pool, TOKENS)
    operation, count = query(made, TOKENS)
    assert count == len(TOKENS)
    parts = len(tier.held) // PAGES
    tier.held[list(tier.held)[4 * parts]] = b"corrupt"
    operation.host_indices = pools.indices(pool, range(PAGES))
    assert made._page_transfer(operation) == 4


def test_controller_ends_a_backup_at_a_batch_that_fails(pool: Any) -> None:
    storage = pools.config({"tiers": [faulty()], "identity": "tests"})
    made = controller(pools.open_backend(storage, pool), pool)
    OpenedFaultyTier.opened[-1].fault = "decline"
    assert backed_up(made, pool, TOKENS).completed_tokens == 0
    assert query(made, TOKENS)[1] == 0


def test_hybrid_controller_prefetches_states_with_the_pages_before_them(tmp_path: Path) -> None:
    anchor, states = pools.mha_pool(), pools.mamba_pool()
    storage = pools.config({"tiers": [disk(tmp_path)], "identity": "tests"})
    backend = pools.open_backend(storage, anchor, {PoolName.MAMBA: states})
    made = hybrid.HybridCacheController.__new__(hybrid.HybridCacheController)
    set_up(made, backend, anchor)
    made.storage_config, made.storage_backend_type = storage, "dynamic"
    entries = {PoolName.KV: anchor, PoolName.MAMBA: states}
    made.mem_pool_host = HostPoolGroup(
        [PoolEntry(name, pool, None, lambda layer: layer) for name, pool in entries.items()]
    )
    for pool in entries.values():
        pools.fill(pool, 1)
    wanted = [pools.page_bytes(anchor, page) for page in range(PAGES)]
    state = pools.page_bytes(states, 3)

    def transfer(keys: list[str], slot: int) -> list[PoolTransfer]:
        return [
            PoolTransfer(
                name=PoolName.MAMBA,
                host_indices=pools.indices(states, [slot]),
                keys=keys,
                hit_policy=PoolHitPolicy.TRAILING_PAGES,
            )
        ]

    def prefetch(slot: int) -> hybrid.PrefetchOperation:
        handle = SimpleNamespace(rid="request")
        return hybrid.PrefetchOperation(handle, TOKENS, None, [], transfer(["?"], slot))

    asked = prefetch(7)
    assert made._storage_hit_query(asked) == ([], 0)
    backup = hybrid.StorageOperation(
        pools.indices(anchor, range(PAGES)),
        TOKENS,
        hash_value=asked.all_hash_values,
        prefix_keys=[],
        pool_transfers=transfer(asked.all_hash_values[-1:], 3),
    )
    made._page_backup(backup)
    assert backup.completed_tokens == len(TOKENS)
    for pool in entries.values():
        pools.fill(pool, 2)
    operation = prefetch(7)
    operation.hash_value, count = made._storage_hit_query(operation)
    assert count == len(TOKENS)
    assert operation.pool_storage_result.restorable_prefix_pages == [PAGES]
    operation.host_indices = pools.indices(anchor, range(12, 12 + PAGES))
    made._page_transfer(operation)
    acknowledged = [made.prefetch_sync_queue.get() for _ in range(2)]
    assert acknowledged[0].completed_tokens == len(TOKENS)
    assert acknowledged[1].pool_hits == {PoolName.MAMBA: 1}
    assert [pools.page_bytes(anchor, page) for page in range(12, 12 + PAGES)] == wanted
    assert pools.page_bytes(states, 7) == state
    backend.close()
