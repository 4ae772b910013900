"""RedisTier with a real cluster: slots, failing nodes, moves, and errors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from redis.crc import key_slot

from kvcache.testing import keys_of
from kvcache.tiers.redis import RedisTier, block_name
from kvcache.tiers.redis.cluster import Cluster
from kvcache.tiers.redis.connect import Connector
from kvcache.tiers.redis.node import Node, RefreshGate
from kvcache.tiers.redis.resp import ErrorReply, Reply
from kvcache.tiers.redis.sockets import Address
from tests.support import redis_servers
from tests.support.checked_loads import blocks, loaded
from tests.support.redis_servers import Server, agrees
from tests.support.server_process import free_port
from tests.support.waiting import PATIENCE_S, eventually
from tests.tiers.test_redis_faults import answers

KEYS = keys_of("cluster", 60)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Server]]:
    with redis_servers.cluster(tmp_path) as nodes:
        yield nodes


@pytest.fixture
def tier(nodes: list[Server]) -> Iterator[RedisTier]:
    with closing(RedisTier(url=nodes[1].url, cluster=True, timeout_s=5)) as tier:
        yield tier


def keys_at(node: int, keys: Sequence[bytes] = KEYS) -> list[bool]:
    """Which keys are at a node, as the cluster was made."""
    return [
        16384 * node // 3 <= key_slot(block_name(key)) < 16384 * (node + 1) // 3 for key in keys
    ]


def keys_elsewhere(node: int) -> list[bool]:
    return [not each for each in keys_at(node)]


def try_load(tier: RedisTier) -> list[bool]:
    """Load; return all False while the tier fails."""
    try:
        return loaded(tier, KEYS)
    except ConnectionError:
        return [False] * len(KEYS)


def test_cluster_store_puts_each_key_at_the_node_of_its_slot(
    tier: RedisTier, nodes: list[Server]
) -> None:
    assert tier.store(KEYS, blocks(KEYS)) == [True] * len(KEYS)
    for number, node in enumerate(nodes):
        expected = {block_name(key) for key, own in zip(KEYS, keys_at(number), strict=True) if own}
        assert set(node.client().keys("*")) == expected
    assert loaded(tier, KEYS[::-1]) == [True] * len(KEYS)


def test_cluster_with_killed_node_misses_only_its_blocks(
    tier: RedisTier, nodes: list[Server]
) -> None:
    tier.store(KEYS, blocks(KEYS))
    nodes[1].kill()  # the node that the URL names
    assert loaded(tier, KEYS) == keys_elsewhere(1)
    assert tier.store(KEYS, blocks(KEYS)) == keys_elsewhere(1)
    nodes[1].start()
    eventually(lambda: all(tier.store(KEYS, blocks(KEYS))), "it is asked again")
    assert loaded(tier, KEYS) == [True] * len(KEYS)


def test_cluster_with_hanging_node_asks_it_once_per_pause(
    nodes: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    execute = Node.execute

    def counted(node: Node, *arguments: Any) -> list[Reply]:
        asked.append(node.address.port)
        return execute(node, *arguments)

    with closing(RedisTier(url=nodes[0].url, cluster=True, timeout_s=0.5)) as tier:
        tier.store(KEYS, blocks(KEYS))
        monkeypatch.setattr(Node, "execute", counted)
        monkeypatch.setattr(Node, "retry_pause_s", 3600)
        monkeypatch.setattr(RefreshGate, "interval_s", 3600)
        with nodes[2].stopped():
            for _ in range(5):
                assert loaded(tier, KEYS) == keys_elsewhere(2)
        assert asked.count(nodes[2].port) == 1  # once, then the pause begins
        assert asked.count(nodes[0].port) == 5
        monkeypatch.setattr(Node, "retry_pause_s", 0.1)
        monkeypatch.setattr(RefreshGate, "interval_s", 0.1)
        eventually(lambda: all(try_load(tier)), "it is asked again")


def test_cluster_with_all_nodes_killed_raises_and_recovers(
    tier: RedisTier, nodes: list[Server]
) -> None:
    for node in nodes:
        node.kill()
    for _ in range(3):
        with pytest.raises(ConnectionError):
            tier.contains(KEYS)
    for node in nodes:
        node.start()
    eventually(lambda: can_look_up(tier), "it is found again")
    eventually(lambda: all(tier.store(KEYS, blocks(KEYS))), "it takes blocks again")
    assert answers(tier, KEYS)


def can_look_up(tier: RedisTier) -> bool:
    try:
        return tier.contains(KEYS) == [False] * len(KEYS)
    except ConnectionError:
        return False


def test_cluster_with_moving_slot_misses_its_blocks_until_moved(
    tier: RedisTier, nodes: list[Server]
) -> None:
    source, target = nodes[0].client(), nodes[2].client()
    key = next(key for key, own in zip(KEYS, keys_at(0), strict=True) if own)
    slot = key_slot(block_name(key))
    ids = {
        client: client.execute_command("CLUSTER", "MYID").decode() for client in (source, target)
    }
    tier.store(KEYS, blocks(KEYS))

    target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    assert loaded(tier, KEYS) == [True] * len(KEYS)
    source.migrate("127.0.0.1", nodes[2].port, [block_name(key)], 0, 5000)
    all_but_moved = [each != key for each in KEYS]
    assert loaded(tier, KEYS) == all_but_moved  # the source replies ASK
    assert tier.store([key], blocks([key])) == [False]

    for client in (target, source, nodes[1].client()):
        client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    assert loaded(tier, KEYS) in (all_but_moved, [True] * len(KEYS))  # MOVED
    assert loaded(tier, KEYS) == [True] * len(KEYS)
    assert tier.store([key], blocks([key])) == [True]


def test_cluster_after_failover_loads_from_the_replica(tmp_path: Path, nodes: list[Server]) -> None:
    replica = Server(tmp_path / "replica", *nodes[0].options)
    try:
        replica.start()
        client = replica.client()
        client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        eventually(lambda: agrees(replica), "it knows the others")
        primary = nodes[0].client().execute_command("CLUSTER", "MYID").decode()
        client.execute_command("CLUSTER", "REPLICATE", primary)
        with closing(RedisTier(url=nodes[0].url, cluster=True, timeout_s=5)) as tier:
            tier.store(KEYS, blocks(KEYS))
            eventually(lambda: client.dbsize() == sum(keys_at(0)), "it has the blocks")
            eventually(
                lambda: client.info("replication")["master_link_status"] == "up", "it follows"
            )
            nodes[0].kill()
            assert loaded(tier, KEYS) == keys_elsewhere(0)
            eventually(lambda: all(try_load(tier)), "it has taken over")
            assert tier.store(KEYS, blocks(KEYS)) == [True] * len(KEYS)
    finally:
        replica.kill()


def test_cluster_with_outdated_map_fetches_it_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    asked: list[float] = []
    address = Address("127.0.0.1", 1)

    def fetch_slot_ranges(*_: object) -> list[tuple[int, int, Address]]:
        asked.append(now)
        return [(0, 16383, address)]

    monkeypatch.setattr("kvcache.tiers.redis.cluster.fetch_slot_ranges", fetch_slot_ranges)
    monkeypatch.setattr("time.monotonic", lambda: now)
    cluster = Cluster(address, Connector(), 1)
    for tenths in range(31):
        now = 100 + tenths / 10
        assert [type(node) for node in cluster.nodes_for([b"name"], now + 1)] == [Node]
        cluster.observe_error(ErrorReply("MOVED", "MOVED 5 127.0.0.1:1"))
    monkeypatch.undo()
    assert asked == [100, 101, 102, 103]


def test_cluster_with_password_accepts_it_and_rejects_another(
    nodes: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_REDIS_PASSWORD", "a password")
    for node in nodes:
        rights = ["~kvcache:*", "+get", "+set", "+exists", "+unlink", "+cluster|slots"]
        node.client().execute_command("ACL", "SETUSER", "kv", "on", ">a password", *rights)
    options: dict[str, Any] = {"cluster": True, "username": "kv", "timeout_s": 5}
    with closing(RedisTier(url=nodes[0].url, password_env="OUR_REDIS_PASSWORD", **options)) as tier:
        assert tier.store(KEYS, blocks(KEYS)) == [True] * len(KEYS)
        assert loaded(tier, KEYS) == [True] * len(KEYS)
    monkeypatch.setenv("OUR_REDIS_PASSWORD", "another")
    with pytest.raises(ValueError, match="the server rejects the tier: redis cluster at"):
        RedisTier(url=nodes[0].url, password_env="OUR_REDIS_PASSWORD", **options)


def test_tier_with_wrong_cluster_option_raises_value_error(
    tmp_path: Path, nodes: list[Server]
) -> None:
    with pytest.raises(ValueError, match="set cluster = true"):
        RedisTier(url=nodes[0].url, timeout_s=5)
    with (
        redis_servers.server(tmp_path / "alone") as alone,
        pytest.raises(ValueError, match="cluster support disabled"),
    ):
        RedisTier(url=alone.url, cluster=True, timeout_s=5)


def test_cluster_without_reachable_node_logs_begin_and_end_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unreachable = Address("127.0.0.1", free_port())
    monkeypatch.setattr(RefreshGate, "interval_s", 0)
    monkeypatch.setattr(Node, "retry_pause_s", 0)
    cluster = Cluster(unreachable, Connector(), 1)
    for _ in range(3):
        [error] = cluster.nodes_for([b"name"], time.monotonic() + PATIENCE_S)
        assert isinstance(error, ErrorReply)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "no server found (redis cluster at 127.0.0.1" in warning
    monkeypatch.setattr(
        "kvcache.tiers.redis.cluster.fetch_slot_ranges", lambda *_: [(0, 16383, unreachable)]
    )
    cluster.nodes_for([b"name"], time.monotonic() + PATIENCE_S)
    assert caplog.records[-1].getMessage() == "kvcache: redis: server found again"
