"""The doctor and a real Redis server: reached, measured, and what it will do when it is full."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache import cli
from tests.tiers import servers
from tests.tiers.servers import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def ask(
    url: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[dict[str, Any]]]:
    profile = tmp_path / "redis.toml"
    profile.write_text(
        '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
        f'[[tier]]\nname = "far"\nkind = "redis"\nurl = "{url}"\n{more}'
    )
    code = cli.main(["doctor", "--profile", str(profile), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    return code, [check for check in checks if check["subject"] == "far"]


@pytest.mark.parametrize(
    ("maxmemory", "policy", "more", "status", "what"),
    [
        ("0", "noeviction", "", "WARN", "no maxmemory"),
        ("64mb", "noeviction", "", "WARN", "declines new blocks"),
        ("64mb", "volatile-lru", "", "WARN", "nothing leave without ttl_s"),
        ("64mb", "volatile-lru", "ttl_s = 60\n", "OK", "of 64MiB"),
        ("64mb", "allkeys-lru", "", "OK", "of 64MiB"),
    ],
)
def test_it_is_tried_and_asked_what_it_does_when_full(
    maxmemory: str,
    policy: str,
    more: str,
    status: str,
    what: str,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.client().flushall()
    server.client().set("somebody's", "value")
    server.client().config_set("maxmemory", maxmemory)
    server.client().config_set("maxmemory-policy", policy)
    code, (tried, full) = ask(server.url, more, tmp_path, capsys)
    assert (code, tried["status"], full["status"]) == (0, "OK", status)
    assert what in full["what"]
    assert bool(full["fix"]) == (status == "WARN")
    assert tried["measured"]["latency_s"] > 0
    assert server.client().keys() == [b"somebody's"]


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = ask("redis://127.0.0.1:1", "", tmp_path, capsys)
    assert (code, [check["status"] for check in found]) == (1, ["FAIL"])
    assert "refused" in found[0]["what"]
