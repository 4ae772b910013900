"""`kvcache inspect` of a real Redis server: it reads the blocks and changes nothing."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache import cli
from kvcache.keys import namespace, namespaced_key
from kvcache.testing import keys_of
from kvcache.tiers.framed import Framed, frame_nbytes
from kvcache.tiers.redis import RedisTier, block_name, description_name
from tests.support import redis_servers
from tests.support.faulty_servers import FaultyServer, replying
from tests.support.frames import BLOCK_NBYTES, kv_like_block
from tests.support.redis_servers import Server

NAMESPACES = [namespace({"model": model}) for model in ("a", "b")]
FRAME = frame_nbytes(BLOCK_NBYTES)
KEYS = [namespaced_key(NAMESPACES[0], key) for key in keys_of("inspected", 3)] + [
    namespaced_key(NAMESPACES[1], b"one")
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def fill(url: str, *, cluster: bool = False) -> None:
    """Store three blocks of one namespace and one of another."""
    inner = RedisTier(url=url, cluster=cluster, timeout_s=30)
    with closing(Framed(inner, block_nbytes=BLOCK_NBYTES)) as tier:
        blocks = [memoryview(kv_like_block(BLOCK_NBYTES, number)) for number in range(4)]
        assert tier.store(KEYS, blocks) == [True] * 4


@pytest.fixture
def filled(server: Server) -> Server:
    server.client().flushall()
    fill(server.url)
    server.client().set("another program's", "value")
    server.client().set("kvcache:1:start:7", "no block")
    return server


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = cli.main(["inspect", "--json", *arguments])
    [found] = json.loads(capsys.readouterr().out)["tiers"]
    return code, found


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_inspect_redis_counts_namespaces(
    transport: str, filled: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = filled.url if transport == "tcp" else f"unix://{filled.socket}"
    code, found = inspected(capsys, url)
    assert (code, found["kind"], found["tier"], found["blocks"]) == (0, "redis", url, 4)
    assert found["namespaces"] == {
        NAMESPACES[0].hex(): {"blocks": 3, "nbytes": 3 * FRAME},
        NAMESPACES[1].hex(): {"blocks": 1, "nbytes": FRAME},
    }
    assert found["when_full"] == "noeviction"
    assert found["used_nbytes"] > 4 * FRAME


def test_inspect_redis_verify_finds_a_damaged_block_and_keeps_it(
    filled: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    filled.client().setrange(block_name(KEYS[1]), 5000, b"damage")
    before = filled.client().dbsize()
    code, found = inspected(capsys, filled.url, "--verify")
    assert code == 1
    held = [found["namespaces"][name.hex()] for name in NAMESPACES]
    assert [(one["intact"], one["rejected"]) for one in held] == [(2, {"checksum": 1}), (1, {})]
    assert filled.client().dbsize() == before


def test_inspect_redis_does_not_extend_a_block_s_life(
    filled: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    name = block_name(KEYS[0])
    filled.client().expire(name, 1000)
    expiry = filled.client().expiretime(name) if has_expiretime(filled) else None
    assert inspected(capsys, filled.url, "--verify")[0] == 0
    assert 0 < filled.client().ttl(name) <= 1000
    assert expiry is None or filled.client().expiretime(name) == expiry


def has_expiretime(server: Server) -> bool:
    return int(server.client().info("server")["redis_version"].split(".")[0]) >= 7


def test_inspect_redis_verify_of_removed_blocks_reports_no_damage(
    filled: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Framed.load

    def remove_then_load(self: Framed, *arguments: Any) -> list[int]:
        filled.client().flushall()
        return load(self, *arguments)

    monkeypatch.setattr(Framed, "load", remove_then_load)
    code, found = inspected(capsys, filled.url, "--verify")
    assert code == 0
    assert found["namespaces"][NAMESPACES[0].hex()]["rejected"] == {"changed": 3}


def test_inspect_redis_verify_of_values_without_a_frame_ends_with_code_2(
    filled: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    filled.client().flushall()
    filled.client().set(block_name(KEYS[0]), "short")
    assert cli.main(["inspect", filled.url, "--verify"]) == 2
    assert "no room for a frame" in capsys.readouterr().err


def test_inspect_redis_cluster_reads_every_primary(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: Any
) -> None:
    with redis_servers.cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        fill(nodes[0].url, cluster=True)
        profile = tmp_path / "cluster.toml"
        profile.write_text(
            '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
            f'[[tier]]\nname = "far"\nkind = "redis"\nurl = "{nodes[0].url}"\ncluster = true\n'
        )
        code, found = inspected(capsys, "--profile", str(profile), "--verify")
    assert (code, found["blocks"]) == (0, 4)
    assert [held["intact"] for held in found["namespaces"].values()] in ([3, 1], [1, 3])


def test_inspect_redis_unreachable_server_ends_with_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["inspect", "redis://127.0.0.1:1"]) == 2
    assert "redis://127.0.0.1:1 cannot be read" in capsys.readouterr().err


def test_inspect_redis_password_in_the_url_is_rejected_and_not_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["inspect", "redis://user:hunter2@127.0.0.1:1"]) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_inspect_redis_described_namespace_has_its_identity(
    filled: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"model": "chat", "weights": "commit 12"}
    with closing(RedisTier(url=filled.url, timeout_s=30)) as tier:
        assert tier.resolve(NAMESPACES[0], json.dumps(about)) == NAMESPACES[0]
    filled.client().set(description_name(NAMESPACES[1]), "no JSON")
    _, found = inspected(capsys, filled.url)
    assert found["namespaces"][NAMESPACES[0].hex()]["identity"] == about
    assert "identity" not in found["namespaces"][NAMESPACES[1].hex()]
    assert found["blocks"] == 4


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:1?password=SECRET77",
        "redis://user:SECRET77@localhost:1",
        "redis+sentinel://localhost:1/mymaster?pw=SECRET77",
        "redis://localhost:1#token=SECRET77",
    ],
)
def test_inspect_redis_url_with_a_secret_is_not_printed(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", url]) == 2
    printed = capsys.readouterr()
    assert "SECRET77" not in printed.out + printed.err
    assert printed.err.startswith("inspect: ")


def test_inspect_redis_error_that_contains_the_password_is_redacted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_REDIS_PASSWORD", "correct-horse-77")
    profile = tmp_path / "redis.toml"
    with FaultyServer(
        replying(b"-ERR unknown \x1b[31m 'AUTH' with 'correct-horse-77'\r\n")
    ) as server:
        profile.write_text(
            '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
            f'[[tier]]\nname = "far"\nkind = "redis"\nurl = "{server.url}"\n'
            'password_env = "OUR_REDIS_PASSWORD"\n'
        )
        assert cli.main(["inspect", "--profile", str(profile)]) == 2
    printed = capsys.readouterr()
    assert "cannot be read" in printed.err
    assert "correct-horse" not in printed.out + printed.err
    assert "\x1b" not in printed.err
