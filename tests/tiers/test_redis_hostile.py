"""RedisTier with hostile servers: time and memory are bounded, and no secret gets out."""

from __future__ import annotations

import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytest.importorskip("redis")

from kvcache.profiles import ProfileError, open_stack
from kvcache.testing import keys_of
from kvcache.tiers.redis import RedisTier
from kvcache.tiers.redis.cluster import Cluster
from kvcache.tiers.redis.connect import Connector
from kvcache.tiers.redis.resp import ErrorReply, ProtocolError
from kvcache.tiers.redis.sockets import Address
from tests.support.faulty_servers import (
    Behaviour,
    FaultyServer,
    dripping,
    empty,
    flooding,
    replying,
    silent,
)
from tests.support.waiting import PATIENCE_S, eventually

PASSWORD = "correct-horse-battery-77"
KEYS = keys_of("hostile", 2)
TIMEOUT_S = 0.5
MAX_WAIT_S = 5.0  # ten timeouts; a call without a deadline would take forever
MAX_GROWTH_NBYTES = 200 << 20  # a reply without a limit would take all memory

ENDLESS_REPLIES: dict[str, Behaviour] = {
    "silent": silent,
    "dripping a line": dripping(b"+O"),
    "dripping lines": dripping(b"+OK\r\n"),
    "dripping a list": dripping(b"*1\r\n"),
    "a flood without a line": flooding(b"+", b"x" * 65536),
    "a flood of lines": flooding(b"", b"+OK\r\n" * 10000),
    "a flood of lists": flooding(b"", b"*1\r\n" * 10000),
    "a flood of empty lists": flooding(b"*1000000000\r\n", b"*0\r\n" * 10000),
    "a flood in a list": flooding(b"*3\r\n", b"$1000000\r\n" + b"x" * 1000000 + b"\r\n"),
    "a value without an end": flooding(b"$2147483647\r\n", b"x" * 65536),
    "a list without an end": flooding(b"*2147483647\r\n", b":1\r\n" * 10000),
    "a number without an end": flooding(b"$", b"9" * 65536),
}


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_PASSWORD", PASSWORD)


def deadline() -> float:
    return time.monotonic() + TIMEOUT_S


def memory_nbytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def profile(folder: Path, url: str, more: str = "") -> str:
    file = folder / "redis.toml"
    file.write_text(
        '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
        f'[[tier]]\nname = "redis"\nkind = "redis"\nurl = "{url}"\ntimeout_s = {TIMEOUT_S}\n{more}'
    )
    return str(file)


# Deadlines and limits


@pytest.mark.parametrize("act", ENDLESS_REPLIES.values(), ids=ENDLESS_REPLIES)
@pytest.mark.parametrize(
    "more",
    ["", 'password_env = "OUR_PASSWORD"', "cluster = true", "sentinel"],
    ids=["plain", "password", "cluster", "sentinel"],
)
def test_open_stack_with_endless_replies_is_bounded_in_time_and_memory(
    act: Behaviour, more: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    message, before, begun = "", memory_nbytes(), time.monotonic()
    with FaultyServer(act) as server:
        url = server.url
        if more == "sentinel":
            url, more = f"redis+sentinel://127.0.0.1:{server.port}/mymaster", ""
        try:
            with open_stack(profile(tmp_path, url, more), block_nbytes=4096):
                pass
        except ProfileError as error:  # an invalid reply may be a permanent error
            message = str(error)
        assert len(message) < 1000
        assert server.connections
    assert time.monotonic() - begun < MAX_WAIT_S
    assert memory_nbytes() - before < MAX_GROWTH_NBYTES


@pytest.mark.parametrize("act", ENDLESS_REPLIES.values(), ids=ENDLESS_REPLIES)
def test_connection_call_with_endless_replies_raises_in_time(act: Behaviour) -> None:
    with FaultyServer(act) as server, closing(connect(server)) as wire:
        begun = time.monotonic()
        with suppress(ProtocolError, OSError):
            while True:  # a flood of whole replies answers some calls
                wire.call(b"CLUSTER", b"SLOTS", deadline=begun + TIMEOUT_S)
        assert time.monotonic() - begun < MAX_WAIT_S


def connect(server: FaultyServer) -> Any:
    return Connector().connect(Address("127.0.0.1", server.port), deadline())


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"*1\r\n" * 8 + b":1\r\n", None),
        (b"*1\r\n" * 9 + b":1\r\n", "lists nested deeper"),
        (b"*1\r\n" * 100_000, "lists nested deeper"),
        (b"$1000000\r\n" + b"x" * 1_000_000 + b"\r\n", None),
        (b"$100000000\r\n", "has more than"),
        (b"*100000000\r\n", "has more than"),
        (b"*" + b"9" * 400 + b"\r\n", "has more than"),
        (b"*16\r\n" + (b"$1100000\r\n" + b"x" * 1_100_000 + b"\r\n") * 16, "has more than"),
        (b"*100000\r\n" + b"*4\r\n:1\r\n:1\r\n:1\r\n:1\r\n" * 100_000, "has more than"),
        (b"%1\r\n", "a reply begins with"),
        (b"$-2\r\n", "a reply begins with"),
        (b"+" + b"x" * 10_000, "a line is too long"),
    ],
)
def test_connection_call_with_reply_beyond_the_limits_raises(
    reply: bytes, message: str | None
) -> None:
    with FaultyServer(replying(reply)) as server, closing(connect(server)) as wire:
        until = time.monotonic() + PATIENCE_S
        if message is None:
            assert wire.call(b"CLUSTER", b"SLOTS", deadline=until)
        else:
            with pytest.raises(ProtocolError, match=message):
                wire.call(b"CLUSTER", b"SLOTS", deadline=until)


def test_connect_with_dripping_tls_handshake_ends_at_the_deadline() -> None:
    with FaultyServer(dripping(b"\x16\x03\x03\x40\x00")) as server:
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"timed out|in time"):
            Connector(tls=True).connect(Address("127.0.0.1", server.port), deadline())
        assert time.monotonic() - begun < MAX_WAIT_S


def test_store_to_server_that_does_not_read_ends_at_the_deadline() -> None:
    large = memoryview(bytes(64 << 20))
    with (
        FaultyServer(replying(b":0\r\n")) as server,
        closing(RedisTier(url=server.url, timeout_s=TIMEOUT_S)) as tier,
    ):
        server.behaviour = silent
        tier.servers.close()  # closes the connection made at start
        begun = time.monotonic()
        with pytest.raises(ConnectionError):
            tier.store(KEYS[:1], [large])
        assert time.monotonic() - begun < MAX_WAIT_S


@pytest.mark.parametrize("act", [silent, dripping(b"+O"), dripping(b"*1\r\n")])
def test_stack_after_logins_that_hang_recovers(act: Behaviour, tmp_path: Path) -> None:
    """There are more logins that hang than the tier has threads."""
    with FaultyServer(empty) as server:
        more = 'password_env = "OUR_PASSWORD"\ncalls = 2\ndeadline_s = 0.6'
        with open_stack(profile(tmp_path, server.url, more), block_nbytes=4096) as stack:
            server.behaviour = act
            for sock in list(server.sockets):
                sock.shutdown(socket.SHUT_RDWR)

            def ask(keys: list[bytes]) -> None:
                with stack.fetch(stack.match(keys).result()).result():
                    pass

            for at in range(6):
                ask(keys_of(f"hangs {at}", 1))
            hung_connections = server.connections
            server.behaviour = empty

            def answers() -> bool:
                ask(keys_of("again", 1))
                return (
                    not stack.stats().lower[0].breaker_open
                    and server.connections > hung_connections
                )

            eventually(answers, "the tier is used again")


# Addresses and slots that a server returns


@pytest.mark.parametrize(
    ("host", "port"),
    [
        *((host, port) for host in (b"", b"?", b"127.0.0.1") for port in (0, 65536)),
        *(
            (host, 7000)
            for host in (b"\x1b[2Jcache", b"a b", b"h" * 300, b"\xff", b"a/b", b"a\r\nb")
        ),
        (PASSWORD.encode(), 7000),
    ],
)
def test_cluster_with_invalid_address_in_slots_returns_an_error(host: bytes, port: int) -> None:
    reply = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$%d\r\n%b\r\n:%d\r\n" % (len(host), host, port)
    with FaultyServer(replying(b"+OK\r\n", reply)) as server:
        login = Connector(password=PASSWORD)
        cluster = Cluster(Address("127.0.0.1", server.port), login, 1)
        [error] = cluster.nodes_for([b"name"], deadline())
        assert isinstance(error, ErrorReply)
        assert "an invalid address" in error.text
        assert PASSWORD not in error.text


@pytest.mark.parametrize("ranges", [[(0, 16384)], [(5, 4)], [(0, 16383), (0, 16383)]])
def test_cluster_with_invalid_slots_returns_an_error(ranges: list[tuple[int, int]]) -> None:
    reply = b"*%d\r\n" % len(ranges)
    for first, last in ranges:
        reply += b"*3\r\n:%d\r\n:%d\r\n*2\r\n$9\r\n127.0.0.1\r\n:7000\r\n" % (first, last)
    with FaultyServer(replying(reply)) as server:
        cluster = Cluster(Address("127.0.0.1", server.port), Connector(), 1)
        [error] = cluster.nodes_for([b"name"], deadline())
        assert isinstance(error, ErrorReply)
        assert "has invalid slots" in error.text


def test_cluster_after_many_moved_errors_has_a_bounded_number_of_nodes() -> None:
    cluster = Cluster(Address("127.0.0.1", 1), Connector(), 1)
    for port in range(1, 3000):
        cluster.observe_error(ErrorReply("MOVED", f"MOVED 5 127.0.0.1:{port}"))
    for invalid in ("", "x", "5", "5 h", "5 h:x", "-5 h:1", "99999 h:1", "5 h h:1", "5 h:99999"):
        cluster.observe_error(ErrorReply("MOVED", f"MOVED {invalid}"))
    assert len(cluster.nodes) == 1024
    assert [str(at) for at, node in enumerate(cluster.slots) if node] == ["5"]
    cluster.close()


def test_cluster_with_all_known_nodes_hanging_is_found_at_its_seed() -> None:
    def slot_map(*ports: int) -> bytes:
        share = 16384 // len(ports)
        nodes = [
            b"*3\r\n:%d\r\n:%d\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n"
            % (at * share, (at + 1) * share - 1, port)
            for at, port in enumerate(ports)
        ]
        return b"*%d\r\n%s" % (len(ports), b"".join(nodes))

    with ExitStack() as opened:
        hanging = [opened.enter_context(FaultyServer(silent)).port for _ in range(16)]
        seed = opened.enter_context(FaultyServer(replying(slot_map(*hanging))))
        cluster = opened.enter_context(
            closing(Cluster(Address("127.0.0.1", seed.port), Connector(), 1))
        )
        cluster.nodes_for([b"a"], deadline())
        assert len(cluster.nodes) == len(hanging)
        seed.behaviour = replying(slot_map(seed.port))
        cluster.observe_error(ErrorReply("NOANSWER", ""))

        def found() -> bool:
            cluster.nodes_for([b"a"], deadline())
            return [node.address.port for node in cluster.nodes.values()] == [seed.port]

        eventually(found, "the seed is asked")


# Texts that a server sends

ECHOES = {
    "whole": PASSWORD,
    "twice": f"{PASSWORD}{PASSWORD}",
    "cut, as Redis cuts arguments": PASSWORD[:-3],
    "with control characters around it": f"\x1b[31m{PASSWORD}\x1b[0m",
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("kind", ["-ERR unknown command 'AUTH', with '{}'", "{}", "-{} no", "+{}"])
@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("after_login", [False, True])
def test_password_repeated_by_a_server_is_in_no_message(
    echo: str,
    kind: str,
    cluster: bool,
    after_login: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    exported: InMemorySpanExporter,
) -> None:
    caplog.set_level(logging.DEBUG)
    reply = kind.format(echo).encode() + b"\r\n"
    more = 'password_env = "OUR_PASSWORD"\n' + "cluster = true\n" * cluster
    replies = [b"+OK\r\n", reply] if after_login else [reply]
    texts = []
    with FaultyServer(replying(*replies)) as server:
        try:
            with (
                open_stack(profile(tmp_path, server.url, more), block_nbytes=4096) as stack,
                stack.fetch(stack.match(KEYS).result()).result(),
            ):
                pass
        except ProfileError as error:
            texts.append(str(error))
    texts += [record.getMessage() for record in caplog.records]
    texts += [span.to_json() for span in exported.get_finished_spans()]
    for text in texts:
        assert PASSWORD[:-3] not in text
        assert not any(char in text for char in "\x1b\x00")


def test_tier_logs_one_error_of_each_code_for_few_codes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies = [b"-E%b \x1b]0;title\x07 %b\r\n" % (b"X" * n, b"y" * 400) for n in range(30)]
    with (
        FaultyServer(replying(*[b":0\r\n"] * 64, *replies)) as server,
        closing(RedisTier(url=server.url, timeout_s=30)) as tier,
    ):
        for _ in range(30):
            assert tier.contains(KEYS[:1]) == [False]
    messages = [record.getMessage() for record in caplog.records]
    assert 1 < len(messages) <= 16
    assert all(text.isprintable() and len(text) < 600 for text in messages)


@pytest.mark.parametrize(
    ("reply", "temporary"),
    [
        (b"-ERR max number of clients reached\r\n", True),
        (b"-LOADING Redis is loading the dataset in memory\r\n", True),
        (b"-WRONGPASS invalid username-password pair\r\n", False),
        (b"-NOPERM this user has no permissions\r\n", False),
    ],
)
@pytest.mark.parametrize("kind", ["database", "cluster", "sentinel"])
def test_tier_with_temporary_error_at_start_opens(reply: bytes, temporary: bool, kind: str) -> None:
    """A full or loading server recovers, so the engine starts without it."""
    with FaultyServer(replying(reply)) as server:
        url = {
            "database": f"{server.url}/1",
            "cluster": server.url,
            "sentinel": f"redis+sentinel://127.0.0.1:{server.port}/mymaster",
        }[kind]
        expectation = (
            nullcontext()
            if temporary
            else pytest.raises(ValueError, match=r"rejects the tier: .*(WRO|NOP)")
        )
        with expectation:
            RedisTier(url=url, cluster=kind == "cluster", timeout_s=30).close()


@pytest.fixture(autouse=True)
def _no_resolver_thread_remains() -> Iterator[None]:
    yield
    hung = [each for each in threading.enumerate() if each.name == "kvcache-redis-resolve"]
    for thread in hung:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in hung)
