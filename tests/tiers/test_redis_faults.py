"""What a real server does in its life: full, read-only, slow, killed, started again."""

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
from tests.support.redis_servers import Server, eventually

NBYTES = 64 << 10
CLEAN = b"\xa5" * NBYTES


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with redis_servers.server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def tier(server: Server) -> Iterator[RedisTier]:
    with closing(RedisTier(url=server.url, timeout_s=30)) as tier:
        yield tier


def blocks(keys: Sequence[bytes]) -> list[memoryview]:
    return [memoryview(block_of(key, NBYTES)) for key in keys]


def loaded(tier: RedisTier, keys: Sequence[bytes]) -> list[bool]:
    """Which blocks came; those are whole and their own, and of the others nothing was written."""
    into = [bytearray(CLEAN) for _ in keys]
    written = tier.load(keys, [memoryview(buffer) for buffer in into])
    for key, nbytes, buffer in zip(keys, written, into, strict=True):
        assert nbytes in (0, NBYTES)
        assert buffer == (block_of(key, NBYTES) if nbytes else CLEAN)
    return [bool(nbytes) for nbytes in written]


def test_a_person_can_read_what_is_there(tier: RedisTier, server: Server) -> None:
    space, key = keys_of("space", 1)[0], keys_of("key", 1)[0]
    tier.store([space + key], blocks([key]))
    [name] = server.client().keys("*")
    assert name.decode() == f"kvcache:1:{space.hex()}:{key.hex()}"
    assert server.client().get(name) == block_of(key, NBYTES)


def test_a_database_is_chosen_by_the_url(server: Server) -> None:
    keys = keys_of("database", 1)
    for url in (f"{server.url}/3", f"unix://{server.socket}?db=3"):
        with closing(RedisTier(url=url)) as tier:
            tier.store(keys, blocks(keys))
            assert tier.contains(keys) == [True]
    assert server.client().info("keyspace").keys() == {"db3"}


def test_what_is_loaded_stays_and_what_is_not_goes(server: Server) -> None:
    keys = keys_of("ttl", 3)
    client = server.client()
    with closing(RedisTier(url=server.url, ttl_s=1000, timeout_s=30)) as tier:
        tier.store(keys, blocks(keys))
        assert all(900 < client.ttl(block_name(key)) <= 1000 for key in keys)
        for key in keys:
            client.expire(block_name(key), 500)
        assert tier.contains(keys[:1]) == [True]
        assert loaded(tier, keys[1:2]) == [True]
        tier.store(keys[2:], blocks(keys[2:]))  # it is there: nothing to do
        left = [client.ttl(block_name(key)) > 900 for key in keys]
        assert left == [False, True, False]
        client.pexpire(block_name(keys[0]), 1)
        eventually(lambda: tier.contains(keys) == [False, True, True], "it expires")
        assert loaded(tier, keys) == [False, True, True]


def test_without_ttl_nothing_expires(tier: RedisTier, server: Server) -> None:
    keys = keys_of("for ever", 1)
    tier.store(keys, blocks(keys))
    assert loaded(tier, keys) == [True]
    assert server.client().ttl(block_name(keys[0])) == -1


def test_a_full_server_declines_serves_what_it_has_and_recovers(
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
    [said] = [record.message for record in caplog.records]
    assert "OOM" in said


def test_what_the_server_evicts_is_missed_and_nothing_is_mixed_up(server: Server) -> None:
    client = server.client()
    client.config_set("maxmemory", client.info("memory")["used_memory"] + (4 << 20))
    client.config_set("maxmemory-policy", "allkeys-lru")
    keys = keys_of("evicted", 160)  # 10 MiB
    with closing(RedisTier(url=server.url, timeout_s=30)) as tier:
        for at in range(0, 160, 8):
            tier.store(keys[at : at + 8], blocks(keys[at : at + 8]))
        held = tier.contains(keys)
        assert 0 < sum(held) < 160
        came = loaded(tier, keys)  # replies take memory too: more may go meanwhile
        assert any(came)
        assert not any(there and not was for there, was in zip(came, held, strict=True))


def test_a_replica_is_read_and_takes_over_when_it_is_told(tmp_path: Path) -> None:
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


def test_after_read_only_the_next_call_makes_a_connection_of_its_own(
    tier: RedisTier, server: Server
) -> None:
    """A name may stand for another server after a fail-over; the old connection never learns."""
    keys = keys_of("demoted", 2)
    server.client().replicaof("127.0.0.1", 1)
    assert tier.store(keys, blocks(keys)) == [False] * 2
    server.client().replicaof("no", "one")
    known = {client["id"] for client in server.client().client_list()}
    assert tier.store(keys, blocks(keys)) == [True] * 2
    after = {client["id"] for client in server.client().client_list() if client["cmd"] == "set"}
    assert after
    assert not after & known


def test_one_key_of_another_type_is_one_miss_and_makes_room(
    tier: RedisTier, server: Server
) -> None:
    keys = keys_of("type", 3)
    tier.store(keys, blocks(keys))
    server.client().delete(block_name(keys[1]))
    server.client().lpush(block_name(keys[1]), "somebody's list")
    assert loaded(tier, keys) == [True, False, True]
    assert tier.store(keys, blocks(keys)) == [True] * 3
    assert loaded(tier, keys) == [True] * 3


@pytest.mark.parametrize("nbytes", [0, NBYTES + 1, 8 * NBYTES])
def test_a_value_that_is_no_block_is_one_miss_and_makes_room(
    tier: RedisTier, server: Server, nbytes: int
) -> None:
    keys = keys_of("length", 3)
    tier.store(keys, blocks(keys))
    server.client().set(block_name(keys[1]), bytes(nbytes))
    assert loaded(tier, keys) == [True, False, True]
    assert tier.contains(keys) == [True, False, True]


def test_a_restart_costs_one_failed_call_at_most(tier: RedisTier, server: Server) -> None:
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
    server.start()  # between two calls: the connection that is left is dead
    assert loaded(tier, keys) == [False] * 3
    assert tier.store(keys, blocks(keys)) == [True] * 3
    assert loaded(tier, keys) == [True] * 3


def test_a_server_that_is_not_there_at_start_is_a_warning(
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


def test_a_server_that_hangs_ends_the_call_and_writes_nothing_afterwards(server: Server) -> None:
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
        assert loaded(tier, keys) == [True] * 3  # each its own: nothing of the calls before
        assert into == [CLEAN] * 3


def answers(tier: RedisTier, keys: Sequence[bytes]) -> bool:
    try:
        return all(tier.contains(keys))
    except ConnectionError:
        return False


def test_killed_and_started_again_under_load(server: Server) -> None:
    """Four threads go on through three deaths: never a wrong byte, never stuck, and it recovers."""
    over = threading.Event()
    deaths = 3

    with closing(RedisTier(url=server.url, timeout_s=5)) as tier:

        def work(thread: int) -> None:
            if thread == 4:
                for _ in range(deaths):
                    eventually(lambda: server.client().dbsize() > 8, "blocks arrive")
                    server.kill()
                    server.start()
                over.set()
                return
            turn = 0
            while not over.is_set():
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
                    assert not nbytes or buffer == block_of(key, NBYTES), "another's bytes"

        run_in_threads(5, work)
        keys = keys_of("afterwards", 4)
        assert tier.store(keys, blocks(keys)) == [True] * 4
        assert loaded(tier, keys) == [True] * 4


def test_no_more_connections_than_were_asked_for(server: Server) -> None:
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
            lambda: not any(c["cmd"] == "get" for c in server.client().client_list()), "it lets go"
        )
        assert tier.contains(keys) == [False] * 4
        assert tier.store(keys, blocks(keys)) == [False] * 4
