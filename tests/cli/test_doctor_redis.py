"""The doctor and a real Redis server: reached, measured, and what it will do when it is full."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache import cli
from tests.support import redis_servers
from tests.support.redis_servers import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
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


def test_nobody_there(tmp_path: Path) -> None:
    """One line says so, and where to say otherwise; the tier's own warning would say it again."""
    l1, url = {"KVCACHE__L1__CAPACITY": "1MiB"}, f"redis://localhost:{redis_servers.free_port()}"
    code, found, log = alone("", l1 | {"KVCACHE__REDIS__URL": url})
    [redis] = [check for check in found if check["status"] != "OK"]  # the extra is there
    assert code == 1
    assert (redis["subject"], redis["status"]) == ("redis", "FAIL")
    assert "refused" in redis["what"]
    assert "KVCACHE__REDIS__..." in redis["fix"]
    assert not log


def test_the_extra_is_not_there() -> None:
    code, found, _ = alone("import sys; sys.modules['redis'] = None", {})
    [profile] = [check for check in found if check["subject"] == "profile"]
    assert code == 1
    assert profile["fix"] == "pip install 'kvcache[redis]'"
    assert not [check for check in found if "not needed by the profile" in check["what"]]


def alone(before: str, environ: dict[str, str]) -> tuple[int, list[dict[str, Any]], str]:
    """The doctor on `l1-redis` in a process of its own, in which `before` was run."""
    run = "from kvcache import cli; raise SystemExit(cli.main(['doctor', '--json']))"
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{before}\n{run}"],
        env=os.environ | paths | {"KVCACHE_PROFILE": "l1-redis"} | environ,
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)["checks"], done.stderr
