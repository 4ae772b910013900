"""A server that is slow, endless, nested or talkative costs its own answers: no time, no memory,
no secret, and not the tier."""

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
from tests.support import redis_servers
from tests.support.faulty_servers import (
    Behaviour,
    FaultyServer,
    dripping,
    empty,
    flooding,
    replying,
    silent,
)
from tests.support.redis_servers import eventually

PASSWORD = "correct-horse-battery-77"
KEYS = keys_of("hostile", 2)
TIMEOUT_S = 0.5
PATIENCE_S = 5.0  # ten timeouts: what had no deadline took for ever
ROOM_NBYTES = 200 << 20  # of memory: what had no limit took all there was

ENDLESS: dict[str, Behaviour] = {
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
    """The most that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def profile(folder: Path, url: str, more: str = "") -> str:
    file = folder / "ours.toml"
    file.write_text(
        '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
        f'[[tier]]\nname = "redis"\nkind = "redis"\nurl = "{url}"\ntimeout_s = {TIMEOUT_S}\n{more}'
    )
    return str(file)


# Deadlines and limits


@pytest.mark.parametrize("act", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize(
    "more",
    ["", 'password_env = "OUR_PASSWORD"', "cluster = true", "sentinel"],
    ids=["plain", "password", "cluster", "sentinel"],
)
def test_open_stack_with_an_endless_server_opens_in_time_and_memory(
    act: Behaviour, more: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    said, before, begun = "", memory_nbytes(), time.monotonic()
    with FaultyServer(act) as server:
        url = server.url
        if more == "sentinel":
            url, more = f"redis+sentinel://127.0.0.1:{server.port}/mymaster", ""
        try:
            with open_stack(profile(tmp_path, url, more), block_nbytes=4096):
                pass
        except ProfileError as error:  # what is not what was asked may be refused for good
            said = str(error)
        assert len(said) < 1000
        assert server.connections
    assert time.monotonic() - begun < PATIENCE_S
    assert memory_nbytes() - before < ROOM_NBYTES


@pytest.mark.parametrize("act", ENDLESS.values(), ids=ENDLESS)
def test_wire_say_with_an_endless_server_raises_in_time(act: Behaviour) -> None:
    with FaultyServer(act) as server, closing(connect(server)) as wire:
        begun = time.monotonic()
        with suppress(ProtocolError, OSError):
            while True:  # a flood of whole replies answers for a while
                wire.call(b"CLUSTER", b"SLOTS", deadline=begun + TIMEOUT_S)
        assert time.monotonic() - begun < PATIENCE_S


def connect(server: FaultyServer) -> Any:
    return Connector().connect(Address("127.0.0.1", server.port), deadline())


@pytest.mark.parametrize(
    ("reply", "says"),
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
def test_wire_say_takes_a_reply_within_the_limits_and_no_other(
    reply: bytes, says: str | None
) -> None:
    with FaultyServer(replying(reply)) as server, closing(connect(server)) as wire:
        until = time.monotonic() + redis_servers.PATIENCE_S
        if says is None:
            assert wire.call(b"CLUSTER", b"SLOTS", deadline=until)
        else:
            with pytest.raises(ProtocolError, match=says):
                wire.call(b"CLUSTER", b"SLOTS", deadline=until)


def test_tls_handshake_that_drips_ends_at_the_deadline() -> None:
    with FaultyServer(dripping(b"\x16\x03\x03\x40\x00")) as server:
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"timed out|in time"):
            Connector(tls=True).connect(Address("127.0.0.1", server.port), deadline())
        assert time.monotonic() - begun < PATIENCE_S


def test_server_that_does_not_read_ends_the_call_at_the_deadline() -> None:
    big = memoryview(bytes(64 << 20))
    with (
        FaultyServer(replying(b":0\r\n")) as server,
        closing(RedisTier(url=server.url, timeout_s=TIMEOUT_S)) as tier,
    ):
        server.behaviour = silent
        tier.servers.close()  # the connection that was made at start
        begun = time.monotonic()
        with pytest.raises(ConnectionError):
            tier.store(KEYS[:1], [big])
        assert time.monotonic() - begun < PATIENCE_S


@pytest.mark.parametrize("act", [silent, dripping(b"+O"), dripping(b"*1\r\n")])
def test_tier_after_greetings_that_hang_recovers(act: Behaviour, tmp_path: Path) -> None:
    """As many as the tier has threads: each used to be lost with the first greeting that hung."""
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
            hung = server.connections
            server.behaviour = empty

            def answers() -> bool:
                ask(keys_of("again", 1))
                return not stack.stats().lower[0].breaker_open and server.connections > hung

            eventually(answers, "the tier is asked again and answers")


# What a server says of other servers


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
def test_slots_at_an_address_that_cannot_be_are_not_learnt(host: bytes, port: int) -> None:
    said = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$%d\r\n%b\r\n:%d\r\n" % (len(host), host, port)
    with FaultyServer(replying(b"+OK\r\n", said)) as server:
        login = Connector(password=PASSWORD)
        cluster = Cluster(Address("127.0.0.1", server.port), login, 1)
        [refused] = cluster.nodes_for([b"name"], deadline())
        assert isinstance(refused, ErrorReply)
        assert "an invalid address" in refused.text
        assert PASSWORD not in refused.text


@pytest.mark.parametrize("ranges", [[(0, 16384)], [(5, 4)], [(0, 16383), (0, 16383)]])
def test_slots_that_cannot_be_are_not_learnt(ranges: list[tuple[int, int]]) -> None:
    said = b"*%d\r\n" % len(ranges)
    for first, last in ranges:
        said += b"*3\r\n:%d\r\n:%d\r\n*2\r\n$9\r\n127.0.0.1\r\n:7000\r\n" % (first, last)
    with FaultyServer(replying(said)) as server:
        cluster = Cluster(Address("127.0.0.1", server.port), Connector(), 1)
        [refused] = cluster.nodes_for([b"name"], deadline())
        assert isinstance(refused, ErrorReply)
        assert "has invalid slots" in refused.text


def test_moved_to_any_number_of_places_makes_a_limited_number_of_nodes() -> None:
    cluster = Cluster(Address("127.0.0.1", 1), Connector(), 1)
    for port in range(1, 3000):
        cluster.observe_error(ErrorReply("MOVED", f"MOVED 5 127.0.0.1:{port}"))
    for wrong in ("", "x", "5", "5 h", "5 h:x", "-5 h:1", "99999 h:1", "5 h h:1", "5 h:99999"):
        cluster.observe_error(ErrorReply("MOVED", f"MOVED {wrong}"))
    assert len(cluster.nodes) == 1024
    assert [str(at) for at, node in enumerate(cluster.slots) if node] == ["5"]
    cluster.close()


def test_cluster_whose_known_nodes_all_hang_is_found_again_at_its_seed() -> None:
    def its_map(*ports: int) -> bytes:
        share = 16384 // len(ports)
        nodes = [
            b"*3\r\n:%d\r\n:%d\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n"
            % (at * share, (at + 1) * share - 1, port)
            for at, port in enumerate(ports)
        ]
        return b"*%d\r\n%s" % (len(ports), b"".join(nodes))

    with ExitStack() as opened:
        hanging = [opened.enter_context(FaultyServer(silent)).port for _ in range(16)]
        seed = opened.enter_context(FaultyServer(replying(its_map(*hanging))))
        cluster = opened.enter_context(
            closing(Cluster(Address("127.0.0.1", seed.port), Connector(), 1))
        )
        cluster.nodes_for([b"a"], deadline())
        assert len(cluster.nodes) == len(hanging)
        seed.behaviour = replying(its_map(seed.port))
        cluster.observe_error(ErrorReply("NOANSWER", ""))

        def found() -> bool:
            cluster.nodes_for([b"a"], deadline())
            return [node.address.port for node in cluster.nodes.values()] == [seed.port]

        eventually(found, "the seed is asked")


# What a server says to people

ECHOES = {
    "whole": PASSWORD,
    "twice": f"{PASSWORD}{PASSWORD}",
    "cut, as Redis cuts arguments": PASSWORD[:-3],
    "with controls around it": f"\x1b[31m{PASSWORD}\x1b[0m",
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("kind", ["-ERR unknown command 'AUTH', with '{}'", "{}", "-{} no", "+{}"])
@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("greeted", [False, True])
def test_password_that_a_server_repeats_reaches_no_message(
    echo: str,
    kind: str,
    cluster: bool,
    greeted: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    exported: InMemorySpanExporter,
) -> None:
    caplog.set_level(logging.DEBUG)
    said = kind.format(echo).encode() + b"\r\n"
    more = 'password_env = "OUR_PASSWORD"\n' + "cluster = true\n" * cluster
    replies = [b"+OK\r\n", said] if greeted else [said]
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


def test_error_at_run_time_is_logged_once_for_each_kind_and_for_few_kinds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies = [b"-E%b \x1b]0;title\x07 %b\r\n" % (b"X" * n, b"y" * 400) for n in range(30)]
    with (
        FaultyServer(replying(*[b":0\r\n"] * 64, *replies)) as server,
        closing(RedisTier(url=server.url, timeout_s=30)) as tier,
    ):
        for _ in range(30):
            assert tier.contains(KEYS[:1]) == [False]
    said = [record.getMessage() for record in caplog.records]
    assert 1 < len(said) <= 16
    assert all(text.isprintable() and len(text) < 600 for text in said)


@pytest.mark.parametrize(
    ("refusal", "passes"),
    [
        (b"-ERR max number of clients reached\r\n", True),
        (b"-LOADING Redis is loading the dataset in memory\r\n", True),
        (b"-WRONGPASS invalid username-password pair\r\n", False),
        (b"-NOPERM this user has no permissions\r\n", False),
    ],
)
@pytest.mark.parametrize("kind", ["database", "cluster", "sentinel"])
def test_server_that_refuses_for_a_while_is_no_error_at_start(
    refusal: bytes, passes: bool, kind: str
) -> None:
    """A full or loading server comes back: the engine starts, and finds it again."""
    with FaultyServer(replying(refusal)) as server:
        url = {
            "database": f"{server.url}/1",
            "cluster": server.url,
            "sentinel": f"redis+sentinel://127.0.0.1:{server.port}/mymaster",
        }[kind]
        refused = (
            nullcontext()
            if passes
            else pytest.raises(ValueError, match=r"rejects the tier: .*(WRO|NOP)")
        )
        with refused:
            RedisTier(url=url, cluster=kind == "cluster", timeout_s=30).close()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    hung = [each for each in threading.enumerate() if each.name == "kvcache-redis-resolve"]
    for thread in hung:
        thread.join(redis_servers.PATIENCE_S)
    assert not any(thread.is_alive() for thread in hung)
