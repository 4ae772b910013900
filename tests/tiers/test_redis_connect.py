"""RedisTier: logins, invalid options, URLs, and passwords that appear nowhere."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache.profiles import ProfileError, open_stack
from kvcache.profiles.options import options_of
from kvcache.testing import keys_of
from kvcache.tiers.redis import RedisTier
from kvcache.tiers.redis.connect import Connector, ServerUrl, parse_url
from kvcache.tiers.redis.sockets import Address
from tests.support import redis_servers
from tests.support.checked_loads import blocks, loaded
from tests.support.redis_servers import Server

PASSWORD = "correct-horse-77"
RIGHTS = "~kvcache:* +get +getex +set +exists +unlink +select"


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_TEST_PASSWORD", PASSWORD)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("WRONG_PASSWORD", PASSWORD[:-1])


@pytest.fixture(autouse=True)
def _no_password_in_the_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert PASSWORD[:-1] not in caplog.text


def require_password(server: Server, *more: str) -> None:
    """Require the password, and create a user "kv" with only the rights that a tier needs."""
    client = server.client()
    client.execute_command("ACL", "SETUSER", "kv", "on", f">{PASSWORD}", *RIGHTS.split(), *more)
    client.config_set("requirepass", PASSWORD)
    server.login = {"password": PASSWORD}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("guarded")) as server:
        require_password(server)
        yield server


# Passwords


@pytest.mark.parametrize("username", ["", "default", "kv"])
def test_tier_with_password_logs_in(guarded: Server, username: str) -> None:
    keys = keys_of(f"login {username}", 2)
    options: dict[str, Any] = {"username": username, "password_env": "REDIS_TEST_PASSWORD"}
    for ttl_s in (0, 100):
        with closing(RedisTier(url=f"{guarded.url}/0", ttl_s=ttl_s, **options)) as tier:
            assert tier.store(keys, blocks(keys)) == [True, True]
            assert tier.contains(keys) == [True, True]
            assert loaded(tier, keys) == [True, True]
            tier.remove(keys)
            assert tier.contains(keys) == [False, False]
            assert PASSWORD not in repr(tier) + repr(vars(tier)) + repr(vars(tier.servers))


@pytest.mark.parametrize(
    ("username", "variable"), [("", ""), ("", "WRONG_PASSWORD"), ("unknown", "REDIS_TEST_PASSWORD")]
)
def test_tier_with_wrong_login_raises_value_error(
    guarded: Server, username: str, variable: str
) -> None:
    with pytest.raises(ValueError, match="the server rejects the tier") as caught:
        RedisTier(url=guarded.url, username=username, password_env=variable)
    assert PASSWORD[:-1] not in str(caught.value)


def test_tier_without_rights_raises_value_error(guarded: Server) -> None:
    client = guarded.client()
    client.execute_command("ACL", "SETUSER", "reader", "on", f">{PASSWORD}", "~*", "+get")
    with pytest.raises(ValueError, match="NOPERM"):
        RedisTier(url=guarded.url, username="reader", password_env="REDIS_TEST_PASSWORD")


def test_tier_with_read_only_user_declines_stores(
    guarded: Server, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("only reads", 2)
    client = guarded.client()
    client.execute_command("ACL", "SETUSER", "half", "on", f">{PASSWORD}", "~*", "+get", "+exists")
    with closing(
        RedisTier(url=guarded.url, username="half", password_env="REDIS_TEST_PASSWORD")
    ) as tier:
        assert tier.store(keys, blocks(keys)) == [False, False]
        assert loaded(tier, keys) == [False, False]
    assert sum("NOPERM" in record.message for record in caplog.records) == 1


def test_tier_after_password_change_raises_connection_error(tmp_path: Path) -> None:
    keys = keys_of("changed", 1)
    with redis_servers.server(tmp_path / "redis") as server:
        require_password(server)
        with closing(RedisTier(url=server.url, password_env="REDIS_TEST_PASSWORD")) as tier:
            server.kill()
            server.login = {}
            server.start()
            server.client().config_set("requirepass", "another")
            with pytest.raises(ConnectionError) as caught:
                tier.contains(keys)
            assert PASSWORD not in str(caught.value)


# Invalid options, and errors without passwords

INVALID_OPTIONS = [
    ({"url": f"redis://:{PASSWORD}@localhost"}, "password_env"),
    ({"url": f"redis://user:{PASSWORD}@localhost:6379/0"}, "password_env"),
    ({"url": f"redis://{PASSWORD}@localhost"}, "password_env"),
    ({"url": f"redis://:{PASSWORD}/@localhost"}, "password_env"),
    ({"url": f"redis://localhost:{PASSWORD}"}, "no valid host and port"),
    ({"url": f"redis://localhost?password={PASSWORD}"}, "password_env"),
    ({"url": f"rediss://localhost/0?ssl=1;a=b&pw={PASSWORD}"}, "password_env"),
    ({"url": f"redis://localhost?x={PASSWORD}"}, "unknown parameters"),
    ({"url": f"redis://localhost#{PASSWORD}"}, "unknown parameters"),
    ({"url": f"redis://localhost/{PASSWORD}"}, "database that is not a number"),
    ({"url": f"unix:///run/redis.sock?password={PASSWORD}"}, "password_env"),
    ({"url": f"unix:///run/redis.sock?db={PASSWORD}"}, "database that is not a number"),
    ({"url": "redis+sentinel://localhost"}, "does not name the master"),
    ({"url": "redis+sentinel://localhost/a b"}, "does not name the master"),
    ({"url": "redis+sentinel://localhost,/a"}, "no host"),
    ({"url": "redis+sentinel:///a"}, "no host"),
    ({"url": "redis+sentinel://localhost,b:x/a"}, "no valid host and port"),
    ({"url": "redis+sentinel://localhost,b?x=1/a"}, "no valid host and port"),
    ({"url": "redis+sentinel://localhost/a/b"}, "database that is not a number"),
    ({"url": "redis+sentinel://localhost/a", "cluster": True}, "not watched by Sentinel"),
    ({"url": "redis://localhost,other"}, "no valid host and port"),
    ({"sentinel_username": "kv"}, "redis+sentinel://"),
    ({"sentinel_password_env": "REDIS_TEST_PASSWORD"}, "redis+sentinel://"),
    (
        {"url": "redis+sentinel://localhost/a", "sentinel_password_env": "EMPTY"},
        "sentinel_password_env is 'EMPTY'",
    ),
    ({"url": "http://localhost"}, "begins with 'http:'"),
    ({"url": "localhost:6379"}, "write redis://HOST"),
    ({"url": ""}, "write redis://HOST"),
    ({"url": "redis://"}, "no host"),
    ({"url": "redis:///1"}, "no host"),
    ({"url": "unix://run/redis.sock"}, "no absolute path"),
    ({"url": "redis://localhost:70000"}, "no valid host and port"),
    ({"url": "redis://localhost/1/2"}, "database that is not a number"),
    (
        {"password_env": "NO_SUCH_VARIABLE"},
        "password_env is 'NO_SUCH_VARIABLE', and this environment",
    ),
    ({"password_env": "EMPTY"}, "password_env is 'EMPTY'"),
    ({"password_env": PASSWORD}, "password_env is a name, and this environment"),
    ({"cluster": True, "url": "redis://localhost/1"}, "only database 0"),
    ({"cluster": True, "url": "unix:///run/redis.sock"}, "a cluster has TCP hosts"),
    ({"ca_file": "ca.pem"}, "rediss://"),
    ({"url": "rediss://localhost", "ca_file": "no such file"}, "ca_file is 'no such file'"),
    ({"ttl_s": -1}, "ttl_s is -1"),
    ({"connections": 0}, "connections is 0"),
    ({"timeout_s": 0.0}, "timeout_s is 0.0"),
    ({"timeout_s": 1e10}, "timeout_s is 10000000000.0"),
]


@pytest.mark.parametrize(("options", "message"), INVALID_OPTIONS)
def test_tier_with_invalid_option_raises_value_error(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        RedisTier(**({"url": "redis://localhost:1"} | options))
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None
    # A profile raises it too, with the line, and recognises some passwords itself.
    with pytest.raises(ProfileError) as caught:
        open_stack(profile(tmp_path, options), block_nbytes=4096)
    (problem,) = caught.value.problems
    line = r'redis\.toml, line (5: tier "redis"|[89]): '
    by_tier = re.search(line, problem) and message in problem
    assert by_tier or re.search(
        r"line [89]: (url|password_env) = .*(no place|takes the name)", problem
    )
    assert PASSWORD not in problem


def profile(folder: Path, options: dict[str, Any]) -> str:
    lines = ['[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"']
    lines.append('[[tier]]\nname = "redis"\nkind = "redis"')
    for name, value in ({"url": "redis://localhost:1"} | options).items():
        lines.append(f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}")
    file = folder / "redis.toml"
    file.write_text("\n".join(lines))
    return str(file)


@pytest.mark.parametrize(
    "options",
    [
        {"password": PASSWORD},
        {"pasword": PASSWORD},
        {"auth": PASSWORD},
        {"urll": f"redis://:{PASSWORD}@localhost"},
        {"capacity": f"redis://user:{PASSWORD}@localhost"},
        {"url": f"redis://:{PASSWORD}@localhost", "timeout_s": "soon"},
    ],
)
def test_unknown_option_is_reported_without_its_password(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProfileError) as caught:
        open_stack(profile(tmp_path, options), block_nbytes=4096)
    assert PASSWORD not in str(caught.value)
    for name, value in options.items():
        monkeypatch.setenv(f"KVCACHE__REDIS__{name.upper()}", str(value))
        monkeypatch.setenv(f"KVCACHE__REDDIS__{name.upper()}", str(value))
    with pytest.raises(ProfileError) as caught:
        open_stack(profile(tmp_path, {}), block_nbytes=4096)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://localhost", ServerUrl((Address("localhost", 6379),))),
        ("redis://cache.example:7000/2", ServerUrl((Address("cache.example", 7000),), database=2)),
        ("redis://10.0.0.1:6379/", ServerUrl((Address("10.0.0.1", 6379),))),
        ("rediss://[::1]:6380/0", ServerUrl((Address("::1", 6380),), tls=True)),
        ("unix:///run/redis.sock", ServerUrl((Address(path="/run/redis.sock"),))),
        ("unix:///run/a%20b?db=5", ServerUrl((Address(path="/run/a b"),), database=5)),
        ("redis+sentinel://a/mymaster", ServerUrl((Address("a", 26379),), master="mymaster")),
        (
            "rediss+sentinel://a:1,[::1]:2,10.0.0.1/my-master.1/3",
            ServerUrl(
                (Address("a", 1), Address("::1", 2), Address("10.0.0.1", 26379)),
                tls=True, database=3, master="my-master.1",
            ),
        ),
    ],
)  # fmt: skip
def test_parse_url_returns_its_parts(url: str, parts: ServerUrl) -> None:
    assert parse_url(url) == parts


def test_tier_with_unknown_database_raises_value_error(guarded: Server) -> None:
    with pytest.raises(ValueError, match="DB index is out of range"):
        RedisTier(url=f"{guarded.url}/9999", password_env="REDIS_TEST_PASSWORD")


def test_options_of_tier_have_types_of_a_profile() -> None:
    assert {option.hint for option in options_of(RedisTier).values()} <= {str, int, float, bool}


def test_connector_repr_has_no_password() -> None:
    assert PASSWORD not in repr(Connector(password=PASSWORD))
