"""SGLang's own cache controller calls the backend: its hashes, its batches, its order of calls."""

from __future__ import annotations

from pathlib import Path
from queue import Queue
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

PAGES = 10
TOKENS = list(range(PAGES * pools.PAGE_TOKENS))


def controller(backend: Any, pool: Any) -> Any:
    """Return SGLang's controller with the parts that transfers to a storage use."""
    made = HiCacheController.__new__(HiCacheController)
    made.storage_backend, made.page_size = backend, pool.page_size
    made.mem_pool_host = made.storage_host_pool = pool
    made.page_get_func, made.page_set_func = made._page_get_zero_copy, made._page_set_zero_copy
    made.prefetch_sync_queue = Queue()
    return made


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
