"""What a server may answer: every surprise is a miss and ends the connection it came on."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

pytest.importorskip("redis")

from hypothesis import given
from hypothesis import strategies as st

from kvcache.testing import block_of, keys_of
from kvcache.tiers.redis import RedisTier, block_name, resp
from tests.support.scripted_redis import CloseConnection, ScriptedRedis

NBYTES = 4096
KEYS = keys_of("wire", 4)
NAMES = [block_name(key) for key in KEYS]
CLEAN = b"\xa5" * NBYTES


def value(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def block(name: bytes) -> bytes:
    """What belongs under a name."""
    return block_of(KEYS[NAMES.index(name)], NBYTES)


def right(words: list[bytes]) -> bytes:
    match words[0]:
        case b"GET":
            return value(block(words[1]))
        case b"SET":
            return b"+OK\r\n"
        case _:
            return b":1\r\n"


def once(answer: Callable[[list[bytes]], bytes], at: int) -> Callable[[list[bytes]], bytes]:
    """All right but for the answer to the command ``at``."""
    count = itertools.count()

    def script(words: list[bytes]) -> bytes:
        return answer(words) if next(count) == at else right(words)

    return script


def opened(server: ScriptedRedis, **options: Any) -> RedisTier:
    return RedisTier(url=server.url, **({"timeout_s": 30} | options))


def loaded(tier: RedisTier) -> list[bool]:
    """Which blocks came; those are whole and their own."""
    into = [bytearray(CLEAN) for _ in KEYS]
    written = tier.load(KEYS, [memoryview(buffer) for buffer in into])
    for key, nbytes, buffer in zip(KEYS, written, into, strict=True):
        assert nbytes in (0, NBYTES)
        assert not nbytes or buffer == block_of(key, NBYTES), "another's bytes"
    return [bool(nbytes) for nbytes in written]


def hang_up(data: bytes) -> bytes:
    raise CloseConnection(data)


SURPRISES: dict[str, Callable[[list[bytes]], bytes]] = {
    "gone": lambda _: hang_up(b""),
    "gone in the number": lambda _: hang_up(b"$40"),
    "gone in the value": lambda words: hang_up(value(block(words[1]))[:2000]),
    "gone before the end of the value": lambda words: hang_up(value(block(words[1]))[:-1]),
    "a value that is too short": lambda words: b"$4096\r\n" + block(words[1])[1:] + b"\r\n+OK\r\n",
    "a value that is too long": lambda words: b"$4096\r\n" + block(words[1]) + b"!\r\n",
    "no such kind": lambda _: b"%1\r\n",
    "a list": lambda _: b"*1\r\n:1\r\n",
    "a message nobody asked for": lambda _: b">2\r\n$1\r\na\r\n$1\r\nb\r\n",
    "no number": lambda _: b"$4o96\r\n",
    "a number below nothing": lambda _: b"$-4096\r\n",
    "a number with room": lambda _: b"$ 4096\r\n",
    "an empty line": lambda _: b"\r\n",
    "a line without an end": lambda _: b"+" + b"x" * 5000,
}


@pytest.mark.parametrize("surprise", SURPRISES.values(), ids=SURPRISES)
@pytest.mark.parametrize("at", [1, 3])
def test_a_surprise_ends_the_connection_and_what_follows_on_it(
    surprise: Callable[[list[bytes]], bytes], at: int
) -> None:
    with ScriptedRedis(once(surprise, at)) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True] * at + [False] * (4 - at)
        assert server.connections == 1
        assert loaded(tier) == [True] * 4
        assert server.connections == 2


@pytest.mark.parametrize("surprise", SURPRISES.values(), ids=SURPRISES)
def test_a_surprise_at_the_first_key_is_a_failed_call(
    surprise: Callable[[list[bytes]], bytes],
) -> None:
    with ScriptedRedis(once(surprise, 0)) as server, closing(opened(server)) as tier:
        with pytest.raises(ConnectionError):
            loaded(tier)
        assert loaded(tier) == [True] * 4


def test_an_error_for_one_key_is_that_keys_and_the_connection_goes_on() -> None:
    with (
        ScriptedRedis(once(lambda _: b"-ERR no\r\n", 1)) as server,
        closing(opened(server)) as tier,
    ):
        assert loaded(tier) == [True, False, True, True]
        assert loaded(tier) == [True] * 4
        assert server.connections == 1


@pytest.mark.parametrize("wrong", [value(b"?" * NBYTES), value(b"?"), b"+OK\r\n"])
def test_what_comes_after_the_last_reply_is_nobodys_answer(wrong: bytes) -> None:
    """Two replies to one command: the second must not be taken for the next call's first."""
    script = once(lambda words: right(words) + wrong, 3)
    with ScriptedRedis(script) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True] * 4
        assert loaded(tier) == [True] * 4
        assert server.connections == 2


def test_a_value_that_is_longer_than_its_buffer_is_read_past_and_removed() -> None:
    def long(words: list[bytes]) -> bytes:
        return value(b"$4096\r\n" * 100_000) if words[:2] == [b"GET", NAMES[1]] else right(words)

    with ScriptedRedis(long) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True, False, True, True]
        assert server.commands[-1] == [b"UNLINK", NAMES[1]]
        assert server.connections == 1


def test_a_thousand_keys_are_one_round_trip() -> None:
    keys, replies = keys_of("many", 1000), itertools.count(1)

    def last(_: list[bytes]) -> bytes:  # nothing is said before everything was asked
        return b":1\r\n" * 1000 if next(replies) == 1000 else b""

    with ScriptedRedis(last) as server, closing(opened(server)) as tier:
        assert tier.contains(keys) == [True] * 1000
        assert [words[1] for words in server.commands] == [block_name(key) for key in keys]


def test_no_more_is_asked_for_than_the_window_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []  # commands, by the calls of sendmsg
    sendmsg = socket.socket.sendmsg

    def counted(self: socket.socket, buffers: list[memoryview]) -> int:
        sent.append(b"".join(buffers).count(b"GET"))
        return sendmsg(self, buffers)

    with ScriptedRedis(right) as server, closing(opened(server)) as tier:
        monkeypatch.setattr(socket.socket, "sendmsg", counted)
        for blocks, sends in ((1, [2, 1, 1, 0]), (3, [3, 1, 0, 0]), (9, [4, 0, 0, 0])):
            monkeypatch.setattr(resp, "WINDOW_NBYTES", blocks * NBYTES)
            assert loaded(tier) == [True] * 4
            assert sent == sends
            sent.clear()


def test_a_server_that_drips_holds_nobody_past_the_deadline() -> None:
    over = threading.Event()

    def drip(_: list[bytes]) -> bytes:
        server.sockets[-1].sendall(b"$4096\r\n")
        while not over.wait(0.02):
            server.sockets[-1].sendall(b"x")
        return b""

    with ScriptedRedis(once(drip, 0)) as server, closing(opened(server, timeout_s=0.5)) as tier:
        with pytest.raises(ConnectionError, match=r"no answer in time|timed out"):
            loaded(tier)
        over.set()


def test_a_connection_that_fails_is_tried_once_in_a_call() -> None:
    with ScriptedRedis(right) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True] * 4
        server.closes_connections = True
        for connections in (2, 3):
            tier.servers.close()
            with pytest.raises(ConnectionError):
                loaded(tier)
            assert server.connections == connections


@pytest.fixture(scope="module")
def noise() -> Iterator[tuple[ScriptedRedis, RedisTier, list[bytes]]]:
    said: list[bytes] = []
    with (
        ScriptedRedis(lambda _: hang_up(said[0])) as server,
        closing(RedisTier(url=server.url, timeout_s=30)) as tier,
    ):
        yield server, tier, said


PIECES = st.sampled_from([b"$", b"+", b"-", b":", b"*", b"\r\n", b"4096", b"-1", b"0", b"x" * 4096])


@given(st.lists(PIECES | st.binary(max_size=20), max_size=12).map(b"".join))
def test_noise_is_a_miss_or_a_value_as_announced(
    noise: tuple[ScriptedRedis, RedisTier, list[bytes]], data: bytes
) -> None:
    _, tier, said = noise
    said[:] = [data]
    buffer = bytearray(CLEAN)
    try:
        [written] = tier.load(KEYS[:1], [memoryview(buffer)])
    except ConnectionError:
        return
    if written and data[:1] == b"$":
        head = b"$%d\r\n" % written
        assert data.startswith(head)
        assert data[len(head) :][: written + 2] == bytes(buffer[:written]) + b"\r\n"
