"""RedisTier with a real server that is full, read-only, slow, killed or restarted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("redis")

from kvcache.testing import block_of, keys_of, run_in_threads
from kvcache.tiers.redis import RedisTier, block_name
from tests.support import redis_servers
from tests.support.checked_loads import CLEAN, NBYTES, blocks, loaded
from tests.support.redis_servers import Server
from tests.support.waiting import eventually


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with redis_servers.server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def tier(server: Server) -> Iterator[RedisTier]:
    with closing(RedisTier(url=server.url, timeout_s=30)) as tier:
        yield tier


def test_store_names_the_key_by_namespace_and_key_in_hex(tier: RedisTier, server: Server) -> None:
    namespace, key = keys_of("namespace", 1)[0], keys_of("key", 1)[0]
    tier.store([namespace + key], blocks([key]))
    [name] = server.client().keys("*")
    assert name.decode() == f"kvcache:1:{namespace.hex()}:{key.hex()}"
    assert server.client().get(name) == block_of(key, NBYTES)


def test_url_selects_the_database(server: Server) -> None:
    keys = keys_of("database", 1)
    for url in (f"{server.url}/3", f"unix://{server.socket}?db=3"):
        with closing(RedisTier(url=url)) as tier:
            tier.store(keys, blocks(keys))
            assert tier.contains(keys) == [True]
    assert server.client().info("keyspace").keys() == {"db3"}


def test_ttl_is_renewed_by_load_and_not_by_lookup_or_store(server: Server) -> None:
    keys = keys_of("ttl", 3)
    client = server.client()
    with closing(RedisTier(url=server.url, ttl_s=1000, timeout_s=30)) as tier:
        tier.store(keys, blocks(keys))
        assert all(900 < client.ttl(block_name(key)) <= 1000 for key in keys)
        for key in keys:
            client.expire(block_name(key), 500)
        assert tier.contains(keys[:1]) == [True]
        assert loaded(tier, keys[1:2]) == [True]
        tier.store(keys[2:], blocks(keys[2:]))  # exists already
        renewed = [client.ttl(block_name(key)) > 900 for key in keys]
        assert renewed == [False, True, False]
        client.pexpire(block_name(keys[0]), 1)
        eventually(lambda: tier.contains(keys) == [False, True, True], "it expires")
        assert loaded(tier, keys) == [False, True, True]


def test_without_ttl_a_block_never_expires(tier: RedisTier, server: Server) -> None:
    keys = keys_of("forever", 1)
    tier.store(keys, blocks(keys))
    assert loaded(tier, keys) == [True]
    assert server.client().ttl(block_name(keys[0])) == -1


def test_full_server_declines_stores_and_serves_loads(
    tier: RedisTier, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = keys_of("old", 3), keys_of("new", 3)
    assert tier.store(old, blocks(old)) == [True] * 3
    server.client().config_set("maxmemory", "1mb")
    assert tier.store(new, blocks(new)) == [False] * 3
    assert tier.store(new, blocks(new)) == [False] * 3
    assert loaded(tier, old + new) == [True] * 3 + [False] * 3
    server.client().config_set("maxmemory", "0")
    assert tier.store(new, blocks(new)) == [True] * 3
    [message] = [record.message for record in caplog.records]
    assert "OOM" in message
    assert tier.usage().declined_blocks == {"OOM": 6}


def test_blocks_evicted_by_the_server_are_missed(server: Server) -> None:
    client = server.client()
    client.config_set("maxmemory", client.info("memory")["used_memory"] + (4 << 20))
    client.config_set("maxmemory-policy", "allkeys-lru")
    keys = keys_of("evicted", 160)  # 10 MiB
    with closing(RedisTier(url=server.url, timeout_s=30)) as tier:
        for at in range(0, 160, 8):
            tier.store(keys[at : at + 8], blocks(keys[at : at + 8]))
        held = tier.contains(keys)
        assert 0 < sum(held) < 160
        hits = loaded(tier, keys)  # replies take memory too: more blocks may be evicted
        assert any(hits)
        assert not any(hit and not was_held for hit, was_held in zip(hits, held, strict=True))


def test_replica_serves_loads_and_accepts_stores_once_promoted(tmp_path: Path) -> None:
    keys, new = keys_of("replica", 3), keys_of("new", 3)
    with (
        redis_servers.server(tmp_path / "a") as primary,
        redis_servers.server(tmp_path / "b") as replica,
    ):
        with closing(RedisTier(url=primary.url, timeout_s=30)) as tier:
            tier.store(keys, blocks(keys))
        replica.client().replicaof("127.0.0.1", primary.port)
        eventually(lambda: replica.client().dbsize() == 3, "it has all")
        with closing(RedisTier(url=replica.url, timeout_s=30)) as tier:
            assert tier.store(new, blocks(new)) == [False] * 3
            assert loaded(tier, keys + new) == [True] * 3 + [False] * 3
            primary.kill()
            replica.client().replicaof("no", "one")
            assert tier.store(new, blocks(new)) == [True] * 3
            assert loaded(tier, keys + new) == [True] * 6


def test_call_after_readonly_uses_a_new_connection(tier: RedisTier, server: Server) -> None:
    """After a failover the host name may lead to another server; old connections do not."""
    keys = keys_of("demoted", 2)
    server.client().replicaof("127.0.0.1", 1)
    assert tier.store(keys, blocks(keys)) == [False] * 2
    server.client().replicaof("no", "one")
    known = {client["id"] for client in server.client().client_list()}
    assert tier.store(keys, blocks(keys)) == [True] * 2
    after = {client["id"] for client in server.client().client_list() if client["cmd"] == "set"}
    assert after
    assert not after & known


def test_load_of_value_of_another_type_misses_and_removes_it(
    tier: RedisTier, server: Server
) -> None:
    keys = keys_of("type", 3)
    tier.store(keys, blocks(keys))
    server.client().delete(block_name(keys[1]))
    server.client().lpush(block_name(keys[1]), "a list")
    assert loaded(tier, keys) == [True, False, True]
    assert tier.store(keys, blocks(keys)) == [True] * 3
    assert loaded(tier, keys) == [True] * 3


@pytest.mark.parametrize("nbytes", [0, NBYTES + 1, 8 * NBYTES])
def test_load_of_empty_or_too_long_value_misses_and_removes_it(
    tier: RedisTier, server: Server, nbytes: int
) -> None:
    keys = keys_of("length", 3)
    tier.store(keys, blocks(keys))
    server.client().set(block_name(keys[1]), bytes(nbytes))
    assert loaded(tier, keys) == [True, False, True]
    assert tier.contains(keys) == [True, False, True]


def test_server_restart_fails_at_most_one_call(tier: RedisTier, server: Server) -> None:
    keys = keys_of("restart", 3)
    tier.store(keys, blocks(keys))
    server.kill()
    for call in (tier.contains, lambda keys: tier.store(keys, blocks(keys))):
        with pytest.raises(ConnectionError, match=rf"redis at 127.0.0.1:{server.port}: "):
            call(keys)
    server.start()
    assert tier.contains(keys) == [False] * 3
    assert tier.store(keys, blocks(keys)) == [True] * 3
    server.kill()
    server.start()  # between two calls: the idle connection is closed
    assert loaded(tier, keys) == [False] * 3
    assert tier.store(keys, blocks(keys)) == [True] * 3
    assert loaded(tier, keys) == [True] * 3


def test_server_down_at_start_is_a_warning(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("late", 2)
    server.kill()
    with closing(RedisTier(url=server.url, timeout_s=30)) as tier:
        [warning] = caplog.records
        assert warning.levelno == logging.WARNING
        assert f"redis at 127.0.0.1:{server.port}: unreachable (" in warning.message
        with pytest.raises(ConnectionError):
            tier.contains(keys)
        server.start()
        assert tier.store(keys, blocks(keys)) == [True, True]
        assert "reachable again" in caplog.records[-1].message


def test_hanging_server_ends_the_call_and_writes_nothing_afterwards(server: Server) -> None:
    keys = keys_of("hang", 3)
    with closing(RedisTier(url=server.url, timeout_s=0.3)) as tier:
        tier.store(keys, blocks(keys))
        into = [bytearray(CLEAN) for _ in keys]
        with server.stopped():
            with pytest.raises(ConnectionError):
                tier.load(keys, [memoryview(buffer) for buffer in into])
            with pytest.raises(ConnectionError):
                tier.contains(keys)
        eventually(server.client().ping, "it goes on")
        assert into == [CLEAN] * 3
        eventually(lambda: answers(tier, keys), "it is asked again")
        assert loaded(tier, keys) == [True] * 3  # no reply of an earlier call
        assert into == [CLEAN] * 3


def answers(tier: RedisTier, keys: Sequence[bytes]) -> bool:
    try:
        return all(tier.contains(keys))
    except ConnectionError:
        return False


def test_server_killed_under_load_never_returns_wrong_bytes(server: Server) -> None:
    """Four threads work through three kills: no wrong byte, no hang, and the tier recovers."""
    done = threading.Event()
    kills = 3

    with closing(RedisTier(url=server.url, timeout_s=5)) as tier:

        def work(thread: int) -> None:
            if thread == 4:
                for _ in range(kills):
                    eventually(lambda: server.client().dbsize() > 8, "blocks arrive")
                    server.kill()
                    server.start()
                done.set()
                return
            turn = 0
            while not done.is_set():
                keys = keys_of(f"under load {turn % 10}", 4)
                turn += 1
                try:
                    tier.store(keys, blocks(keys))
                    into = [bytearray(NBYTES) for _ in keys]
                    written = tier.load(keys, [memoryview(buffer) for buffer in into])
                    tier.remove(keys[:1])
                except ConnectionError:
                    continue
                for key, nbytes, buffer in zip(keys, written, into, strict=True):
                    assert not nbytes or buffer == block_of(key, NBYTES), (
                        "the bytes of another block"
                    )

        run_in_threads(5, work)
        keys = keys_of("afterwards", 4)
        assert tier.store(keys, blocks(keys)) == [True] * 4
        assert loaded(tier, keys) == [True] * 4


def test_connections_are_bounded_and_closed_with_the_tier(server: Server) -> None:
    keys = keys_of("connections", 4)
    with closing(RedisTier(url=server.url, connections=2, timeout_s=30)) as tier:

        def work(thread: int) -> None:
            for _ in range(20):
                tier.store(keys, blocks(keys))
                assert loaded(tier, keys) == [True] * 4

        run_in_threads(6, work)
        clients = server.client().client_list()
        assert 1 <= sum(client["cmd"] in {"get", "set"} for client in clients) <= 2
        tier.close()
        eventually(
            lambda: not any(c["cmd"] == "get" for c in server.client().client_list()),
            "the connections are closed",
        )
        assert tier.contains(keys) == [False] * 4
        assert tier.store(keys, blocks(keys)) == [False] * 4
