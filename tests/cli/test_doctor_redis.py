"""The doctor with a real Redis server: it is measured, and its memory policy is reported."""

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
from tests.support.server_process import free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def check(
    url: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[dict[str, Any]]]:
    profile = tmp_path / "redis.toml"
    profile.write_text(
        '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
        f'[[tier]]\nname = "far"\nkind = "redis"\nurl = "{url}"\n{options}'
    )
    code = cli.main(["doctor", "--profile", str(profile), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    return code, [check for check in checks if check["subject"] == "far"]


@pytest.mark.parametrize(
    ("maxmemory", "policy", "options", "status", "what"),
    [
        ("0", "noeviction", "", "WARN", "no maxmemory"),
        ("64mb", "noeviction", "", "WARN", "declines new blocks"),
        ("64mb", "volatile-lru", "", "WARN", "evicts nothing without ttl_s"),
        ("64mb", "volatile-lru", "ttl_s = 60\n", "OK", "of 64MiB"),
        ("64mb", "allkeys-lru", "", "OK", "of 64MiB"),
    ],
)
def test_server_is_measured_and_its_memory_policy_reported(
    maxmemory: str,
    policy: str,
    options: str,
    status: str,
    what: str,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.client().flushall()
    server.client().set("another program's", "value")
    server.client().config_set("maxmemory", maxmemory)
    server.client().config_set("maxmemory-policy", policy)
    code, (probe, memory) = check(server.url, options, tmp_path, capsys)
    assert (code, probe["status"], memory["status"]) == (0, "OK", status)
    assert what in memory["what"]
    assert bool(memory["fix"]) == (status == "WARN")
    assert probe["measured"]["latency_s"] > 0
    assert server.client().keys() == [b"another program's"]


def test_unreachable_server_is_one_failure_without_a_log() -> None:
    """The result contains the cause, so the tier's own warning is not printed."""
    l1, url = {"KVCACHE__L1__CAPACITY": "1MiB"}, f"redis://localhost:{free_port()}"
    code, found, log = check_in_a_process("", l1 | {"KVCACHE__REDIS__URL": url})
    [redis] = [check for check in found if check["status"] == "FAIL"]  # the extra is installed
    assert code == 1
    assert redis["subject"] == "redis"
    assert "refused" in redis["what"]
    assert "KVCACHE__REDIS__..." in redis["fix"]
    assert not log


def test_missing_extra_fails_with_the_pip_command() -> None:
    code, found, _ = check_in_a_process("import sys; sys.modules['redis'] = None", {})
    [profile] = [check for check in found if check["subject"] == "profile"]
    assert code == 1
    assert profile["fix"] == "pip install 'kvcache[redis]'"
    assert not [check for check in found if "not needed by the profile" in check["what"]]


def check_in_a_process(
    setup: str, environ: dict[str, str]
) -> tuple[int, list[dict[str, Any]], str]:
    """Run `setup`, then the doctor on `l1-redis`, in a process of its own."""
    run = "from kvcache import cli; raise SystemExit(cli.main(['doctor', '--json']))"
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{setup}\n{run}"],
        env=os.environ | paths | {"KVCACHE_PROFILE": "l1-redis"} | environ,
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)["checks"], done.stderr
