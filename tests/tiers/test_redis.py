"""RedisTier with real servers: the contract of tiers, and forked children."""

from collections.abc import Iterator
from contextlib import closing

import pytest

pytest.importorskip("redis")

from kvcache.testing import TierTests, block_of, keys_of
from kvcache.tiers.framed import Framed
from kvcache.tiers.redis import RedisTier
from tests.support import redis_servers
from tests.support.forked_children import methods_usable_in_child, run_in_child
from tests.support.redis_servers import Server


@pytest.fixture(scope="module", params=redis_servers.binaries(), ids=lambda path: path.name)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis"), binary=request.param) as server:
        yield server


@pytest.fixture(params=["tcp", "unix"])
def tier(request: pytest.FixtureRequest, server: Server) -> Iterator[RedisTier]:
    server.client().flushall()
    url = server.url if request.param == "tcp" else f"unix://{server.socket}"
    with closing(RedisTier(url=url, timeout_s=30)) as tier:
        yield tier


class TestRedisTier(TierTests):
    pass


class TestRedisTierWithTtl(TierTests):
    @pytest.fixture
    def tier(self, server: Server) -> Iterator[RedisTier]:
        server.client().flushall()
        with closing(RedisTier(url=server.url, ttl_s=1000, timeout_s=30)) as tier:
            yield tier


class TestFramedRedis(TierTests):
    @pytest.fixture
    def tier(self, server: Server) -> Iterator[Framed]:
        server.client().flushall()
        inner = RedisTier(url=server.url, timeout_s=30)
        with closing(Framed(inner, block_nbytes=self.block_nbytes)) as tier:
            yield tier


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with redis_servers.cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


class TestRedisCluster(TierTests):
    @pytest.fixture
    def tier(self, nodes: list[Server]) -> Iterator[RedisTier]:
        for node in nodes:
            node.client().flushall()
        with closing(RedisTier(url=nodes[1].url, cluster=True, timeout_s=30)) as tier:
            yield tier


def test_tier_in_forked_child_raises_and_parent_keeps_its_connections(
    tier: RedisTier, server: Server
) -> None:
    keys = keys_of("parent", 4)
    blocks = [block_of(key, 4096) for key in keys]
    assert all(tier.store(keys, [memoryview(block) for block in blocks]))
    before = {client["id"] for client in server.client().client_list()}
    assert methods_usable_in_child(tier) == []
    run_in_child(tier.close)
    buffers = [bytearray(4096) for _ in keys]
    assert tier.load(keys, [memoryview(buffer) for buffer in buffers]) == [4096] * 4
    assert buffers == blocks
    own = {client["id"] for client in server.client().client_list() if client["cmd"] == "get"}
    assert own
    assert own <= before
