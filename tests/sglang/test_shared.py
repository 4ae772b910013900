"""Two servers that share a Redis server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import redis_servers
from tests.support import sglang_pools as pools
from tests.support.sglang_tiers import PATIENT

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("layout", pools.LAYOUTS)
def test_servers_share_pages_through_redis(tmp_path: Path, layout: str) -> None:
    keys, at = pools.page_keys(8), list(range(8))
    with redis_servers.server(tmp_path) as server:
        table = {"name": "redis", "kind": "redis", "url": server.url, **PATIENT}
        storage = pools.config({"tiers": [table], "identity": "tests"})
        first, second = pools.mha_pool(layout), pools.mha_pool(layout)
        writer = pools.open_backend(storage, first)
        reader = pools.open_backend(storage, second)
        pools.fill(first, 1)
        assert reader.batch_exists(keys) == 0
        assert writer.batch_set_v1(keys, pools.indices(first, at)) == [True] * 8
        assert reader.batch_exists(keys) == 8
        assert reader.batch_get_v1(keys, pools.indices(second, at)) == [True] * 8
        wanted = [pools.page_bytes(first, page) for page in at]
        assert [pools.page_bytes(second, page) for page in at] == wanted
        writer.close()
        reader.close()
