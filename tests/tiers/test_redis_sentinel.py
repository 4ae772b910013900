"""RedisTier with real Sentinels: the master that they name, failovers, and errors."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

import redis

from kvcache import cli
from kvcache.testing import keys_of
from kvcache.tiers.redis import RedisTier, block_name
from kvcache.tiers.redis.connect import Connector
from kvcache.tiers.redis.resp import ErrorReply
from kvcache.tiers.redis.sentinel import SentinelMaster
from kvcache.tiers.redis.sockets import Address
from tests.support import redis_servers
from tests.support.checked_loads import blocks, loaded
from tests.support.faulty_servers import FaultyServer, replying, silent
from tests.support.redis_servers import Sentinel, Server
from tests.support.server_process import free_port
from tests.support.waiting import PATIENCE_S, eventually

KEYS = keys_of("watched", 8)

ServersAndSentinels = tuple[list[Server], list[Sentinel]]


def url_of(sentinels: Sequence[Sentinel], path: str = "mymaster") -> str:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    return f"redis+sentinel://{hosts}/{path}"


def deadline() -> float:
    return time.monotonic() + PATIENCE_S


def try_store(tier: RedisTier) -> list[bool]:
    """Store; return all False while the tier fails."""
    try:
        return tier.store(KEYS, blocks(KEYS))
    except ConnectionError:
        return [False] * len(KEYS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServersAndSentinels]:
    """One server and one Sentinel: no failover."""
    with redis_servers.watched(tmp_path_factory.mktemp("alone"), count=1, replicas=0) as servers:
        yield servers


def test_tier_after_failover_uses_the_new_master(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_servers.watched(tmp_path) as (data, sentinels):
        master, replica = data
        with closing(RedisTier(url=url_of(sentinels), timeout_s=5)) as tier:
            assert tier.store(KEYS, blocks(KEYS)) == [True] * len(KEYS)
            assert master.client().dbsize() == len(KEYS)
            eventually(lambda: replica.client().dbsize() == len(KEYS), "the replica has them")
            sentinels[0].kill()  # the Sentinel that was asked
            master.kill()
            with pytest.raises(ConnectionError):
                tier.contains(KEYS)
            eventually(lambda: all(try_store(tier)), "the other one is the master, and is asked")
            assert loaded(tier, KEYS) == [True] * len(KEYS)
            assert replica.client().info("replication")["role"] == "master"
        [change] = [r.getMessage() for r in caplog.records if "moved from" in r.getMessage()]
        assert change == (
            f"kvcache: redis: master mymaster moved from 127.0.0.1:{master.port} to "
            f"127.0.0.1:{replica.port} (Sentinel); calls follow it"
        )


@pytest.mark.parametrize("closes", [False, True], ids=["READONLY", "closed connection"])
def test_tier_with_master_demoted_to_replica_finds_the_new_master(
    closes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sentinel itself does this to the old master eight seconds after a failover."""
    with redis_servers.watched(tmp_path, count=1) as (data, sentinels):
        old, new = data
        with closing(RedisTier(url=url_of(sentinels), timeout_s=5)) as tier:
            assert tier.contains(KEYS) == [False] * len(KEYS)
            eventually(lambda: begin_failover(sentinels[0]), "a failover begins")
            eventually(
                lambda: sentinels[0].client().sentinel_masters()["mymaster"]["port"] == new.port,
                "Sentinel names the new master",
            )
            old.client().replicaof("127.0.0.1", new.port)
            if closes:  # then a lookup succeeds on the replica
                old.client().client_kill_filter(_type="normal", skipme=True)
                eventually(lambda: tier.contains(KEYS) and "moved from" in caplog.text, "it moves")
            eventually(lambda: all(try_store(tier)), "blocks are stored in the new master")
            assert "moved from" in caplog.text
            assert new.client().exists(*map(block_name, KEYS)) == len(KEYS)
            assert loaded(tier, KEYS) == [True] * len(KEYS)


def begin_failover(sentinel: Sentinel) -> bool:
    """Begin a failover; return whether the Sentinel accepted: it must know the replica."""
    try:
        sentinel.client().execute_command("SENTINEL", "FAILOVER", "mymaster")
    except redis.ResponseError:
        return False
    return True


def test_find_master_with_sentinel_down_or_hanging_asks_the_next(
    alone: ServersAndSentinels,
) -> None:
    data, sentinels = alone
    with FaultyServer(silent) as hanging:
        ports = [hanging.port, free_port(), sentinels[0].port]
        addresses = [Address("127.0.0.1", port) for port in ports]
        master = SentinelMaster(addresses, "mymaster", Connector(), Connector(), 1)
        for _ in range(3):
            assert master.find_master(time.monotonic() + 2).port == data[0].port
        assert hanging.connections == 1  # the Sentinel that answered is asked first afterwards


def test_tier_with_sentinels_down_at_start_warns_and_finds_them_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_servers.watched(tmp_path, count=1, replicas=0) as (data, sentinels):
        sentinels[0].kill()
        with closing(RedisTier(url=url_of(sentinels), timeout_s=5)) as tier:
            [warning] = caplog.records
            assert warning.levelno == logging.WARNING
            assert f"redis sentinel at 127.0.0.1:{sentinels[0].port}: " in warning.getMessage()
            with pytest.raises(ConnectionError, match=r"redis sentinel at"):
                tier.contains(KEYS)
            assert len(caplog.records) == 1
            sentinels[0].start()
            eventually(lambda: all(try_store(tier)), "the master is found")
            assert data[0].client().dbsize() == len(KEYS)


def test_tier_with_master_down_at_start_finds_it_later(tmp_path: Path) -> None:
    with redis_servers.watched(tmp_path, count=1, replicas=0) as (data, sentinels):
        data[0].kill()
        sentinel = sentinels[0].client()
        eventually(
            lambda: sentinel.sentinel_masters()["mymaster"]["is_sdown"],
            "it is seen to be down",
        )
        with closing(RedisTier(url=url_of(sentinels), timeout_s=5)) as tier:
            with pytest.raises(ConnectionError, match="reports that the master mymaster is down"):
                tier.contains(KEYS)
            data[0].start()
            eventually(lambda: all(try_store(tier)), "it is found")


def test_tier_selects_the_database_of_the_url_at_the_master(alone: ServersAndSentinels) -> None:
    data, sentinels = alone
    data[0].client().flushall()
    with closing(RedisTier(url=url_of(sentinels, "mymaster/3"), timeout_s=5)) as tier:
        assert tier.store(KEYS, blocks(KEYS)) == [True] * len(KEYS)
    assert data[0].client().info("keyspace").keys() == {"db3"}


def test_tier_uses_separate_passwords_for_sentinel_and_master(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_REDIS_PASSWORD", "of-the-master")
    monkeypatch.setenv("OUR_SENTINEL_PASSWORD", "of-the-sentinel")
    with redis_servers.watched(tmp_path, count=1, replicas=0) as (data, sentinels):
        for server, rights in (
            (data[0], "~kvcache:* +get +set +exists +unlink"),
            (sentinels[0], "+sentinel|masters"),
        ):
            word = ">of-the-master" if server is data[0] else ">of-the-sentinel"
            server.client().execute_command("ACL", "SETUSER", "kv", "on", word, *rights.split())
        options: dict[str, Any] = {
            "url": url_of(sentinels),
            "username": "kv",
            "password_env": "OUR_REDIS_PASSWORD",
            "sentinel_username": "kv",
            "sentinel_password_env": "OUR_SENTINEL_PASSWORD",
            "timeout_s": 5,
        }
        with closing(RedisTier(**options)) as tier:
            assert tier.store(KEYS, blocks(KEYS)) == [True] * len(KEYS)
            assert "of-the-" not in repr(vars(tier)) + repr(vars(tier.servers))
        for wrong in ("password_env", "sentinel_password_env"):
            other = {"password_env": "OUR_SENTINEL_PASSWORD"}.get(wrong, "OUR_REDIS_PASSWORD")
            with pytest.raises(ValueError, match="WRONGPASS") as caught:
                RedisTier(**options | {wrong: other})
            assert ("redis sentinel at" in str(caught.value)) == (wrong != "password_env")
            assert "of-the-" not in str(caught.value)


def test_tier_with_url_of_the_wrong_kind_raises_a_hint(alone: ServersAndSentinels) -> None:
    data, sentinels = alone
    for path in ("", "/3"):
        with pytest.raises(ValueError, match=r"if it is a Sentinel, url is redis\+sentinel://"):
            RedisTier(url=f"redis://127.0.0.1:{sentinels[0].port}{path}", timeout_s=5)
    with pytest.raises(ValueError, match="if it is not a Sentinel, url is redis://"):
        RedisTier(url=f"redis+sentinel://127.0.0.1:{data[0].port}/mymaster", timeout_s=5)
    with pytest.raises(ValueError, match="ERR unknown command"):
        RedisTier(url=sentinels[0].url, cluster=True, timeout_s=5)


def test_tier_with_unknown_master_name_raises_value_error(alone: ServersAndSentinels) -> None:
    _, sentinels = alone
    with pytest.raises(ValueError, match="does not watch a master theirs; it watches mymaster"):
        RedisTier(url=url_of(sentinels, "theirs"), timeout_s=5)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"*0\r\n", "does not watch a master mymaster; it watches none"),
        (b":1\r\n", "answer to SENTINEL MASTERS is invalid"),
        (b"*1\r\n:1\r\n", "answer to SENTINEL MASTERS is invalid"),
        (b"*1\r\n*2\r\n$4\r\nname\r\n$8\r\nmymaster\r\n", "answer to SENTINEL MASTERS is invalid"),
        (b"*1\r\n*3\r\n:1\r\n:2\r\n:3\r\n", "answer to SENTINEL MASTERS is invalid"),
        (b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n", "lists nested deeper"),
        (b"-ERR no\r\n", "ERR no"),
        (b"+OK\r\n", "answer to SENTINEL MASTERS is invalid"),
    ],
)
def test_sentinel_with_invalid_reply_returns_one_error(reply: bytes, message: str) -> None:
    with FaultyServer(replying(reply)) as server:
        address = Address("127.0.0.1", server.port)
        master = SentinelMaster([address], "mymaster", Connector(), Connector(), 1)
        [error] = master.nodes_for([b"name"], deadline())
        assert isinstance(error, ErrorReply)
        assert message in error.text


@pytest.mark.parametrize("one_down", [False, True])
def test_unknown_master_is_a_permanent_error_only_if_all_sentinels_answered(one_down: bool) -> None:
    with FaultyServer(replying(b"*0\r\n")) as server:
        ports = [server.port, free_port()] if one_down else [server.port]
        addresses = [Address("127.0.0.1", port) for port in ports]
        master = SentinelMaster(addresses, "mymaster", Connector(), Connector(), 1)
        [error] = master.nodes_for([b"name"], deadline())
        assert isinstance(error, ErrorReply)
        assert error.code == ("NOANSWER" if one_down else "LOGIN")


def test_inspect_and_doctor_accept_a_sentinel_url(
    alone: ServersAndSentinels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, sentinels = alone
    data[0].client().flushall()
    url = url_of(sentinels)
    with closing(RedisTier(url=url, timeout_s=5)) as tier:
        assert tier.store(KEYS, blocks(KEYS)) == [True] * len(KEYS)
    assert cli.main(["inspect", "--json", url]) == 0
    [found] = json.loads(capsys.readouterr().out)["tiers"]
    assert (found["tier"], found["blocks"]) == (url, len(KEYS))
    assert cli.main(["inspect", "--json", url_of(sentinels, "theirs")]) == 2
    assert "does not watch a master theirs" in capsys.readouterr().err

    profile = tmp_path / "watched.toml"
    profile.write_text(
        '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
        f'[[tier]]\nname = "far"\nkind = "redis"\nurl = "{url}"\n'
    )
    assert cli.main(["doctor", "--profile", str(profile), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    far = [check["status"] for check in checks if check["subject"] == "far"]
    assert far == ["OK", "WARN"]  # it has no maxmemory
