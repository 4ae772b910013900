"""RESP2 replies: an invalid reply is a miss and closes its connection."""

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
    """Return the block of a key in the server."""
    return block_of(KEYS[NAMES.index(name)], NBYTES)


def correct_reply(words: list[bytes]) -> bytes:
    match words[0]:
        case b"GET":
            return value(block(words[1]))
        case b"SET":
            return b"+OK\r\n"
        case _:
            return b":1\r\n"


def once(answer: Callable[[list[bytes]], bytes], at: int) -> Callable[[list[bytes]], bytes]:
    """Return a script with correct replies, except to command number ``at``."""
    count = itertools.count()

    def script(words: list[bytes]) -> bytes:
        return answer(words) if next(count) == at else correct_reply(words)

    return script


def opened(server: ScriptedRedis, **options: Any) -> RedisTier:
    return RedisTier(url=server.url, **({"timeout_s": 30} | options))


def loaded(tier: RedisTier) -> list[bool]:
    """Load; return which are hits. Checks their bytes."""
    into = [bytearray(CLEAN) for _ in KEYS]
    written = tier.load(KEYS, [memoryview(buffer) for buffer in into])
    for key, nbytes, buffer in zip(KEYS, written, into, strict=True):
        assert nbytes in (0, NBYTES)
        assert not nbytes or buffer == block_of(key, NBYTES), "the bytes of another block"
    return [bool(nbytes) for nbytes in written]


def hang_up(data: bytes) -> bytes:
    raise CloseConnection(data)


INVALID_REPLIES: dict[str, Callable[[list[bytes]], bytes]] = {
    "closed": lambda _: hang_up(b""),
    "closed within the number": lambda _: hang_up(b"$40"),
    "closed within the value": lambda words: hang_up(value(block(words[1]))[:2000]),
    "closed before the end of the value": lambda words: hang_up(value(block(words[1]))[:-1]),
    "a value that is too short": lambda words: b"$4096\r\n" + block(words[1])[1:] + b"\r\n+OK\r\n",
    "a value that is too long": lambda words: b"$4096\r\n" + block(words[1]) + b"!\r\n",
    "unknown kind": lambda _: b"%1\r\n",
    "a list": lambda _: b"*1\r\n:1\r\n",
    "a push message": lambda _: b">2\r\n$1\r\na\r\n$1\r\nb\r\n",
    "an invalid number": lambda _: b"$4o96\r\n",
    "a negative number": lambda _: b"$-4096\r\n",
    "a number with a space": lambda _: b"$ 4096\r\n",
    "an empty line": lambda _: b"\r\n",
    "a line without an end": lambda _: b"+" + b"x" * 5000,
}


@pytest.mark.parametrize("invalid_reply", INVALID_REPLIES.values(), ids=INVALID_REPLIES)
@pytest.mark.parametrize("at", [1, 3])
def test_invalid_reply_misses_it_and_the_following_keys(
    invalid_reply: Callable[[list[bytes]], bytes], at: int
) -> None:
    with ScriptedRedis(once(invalid_reply, at)) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True] * at + [False] * (4 - at)
        assert server.connections == 1
        assert loaded(tier) == [True] * 4
        assert server.connections == 2


@pytest.mark.parametrize("invalid_reply", INVALID_REPLIES.values(), ids=INVALID_REPLIES)
def test_invalid_first_reply_fails_the_call(
    invalid_reply: Callable[[list[bytes]], bytes],
) -> None:
    with ScriptedRedis(once(invalid_reply, 0)) as server, closing(opened(server)) as tier:
        with pytest.raises(ConnectionError):
            loaded(tier)
        assert loaded(tier) == [True] * 4


def test_error_for_one_key_misses_it_and_keeps_the_connection() -> None:
    with (
        ScriptedRedis(once(lambda _: b"-ERR no\r\n", 1)) as server,
        closing(opened(server)) as tier,
    ):
        assert loaded(tier) == [True, False, True, True]
        assert loaded(tier) == [True] * 4
        assert server.connections == 1


@pytest.mark.parametrize("extra", [value(b"?" * NBYTES), value(b"?"), b"+OK\r\n"])
def test_data_after_the_last_reply_closes_the_connection(extra: bytes) -> None:
    """A second reply to a command must not be used as the first reply of the next call."""
    script = once(lambda words: correct_reply(words) + extra, 3)
    with ScriptedRedis(script) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True] * 4
        assert loaded(tier) == [True] * 4
        assert server.connections == 2


def test_value_longer_than_its_buffer_is_discarded_and_removed() -> None:
    def long(words: list[bytes]) -> bytes:
        return (
            value(b"$4096\r\n" * 100_000)
            if words[:2] == [b"GET", NAMES[1]]
            else correct_reply(words)
        )

    with ScriptedRedis(long) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True, False, True, True]
        assert server.commands[-1] == [b"UNLINK", NAMES[1]]
        assert server.connections == 1


def test_lookup_of_1000_keys_is_one_round_trip() -> None:
    keys, replies = keys_of("many", 1000), itertools.count(1)

    def last(_: list[bytes]) -> bytes:  # no reply before the last command
        return b":1\r\n" * 1000 if next(replies) == 1000 else b""

    with ScriptedRedis(last) as server, closing(opened(server)) as tier:
        assert tier.contains(keys) == [True] * 1000
        assert [words[1] for words in server.commands] == [block_name(key) for key in keys]


def test_exchange_sends_no_more_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []  # commands, by the calls of sendmsg
    sendmsg = socket.socket.sendmsg

    def counted(self: socket.socket, buffers: list[memoryview]) -> int:
        sent.append(b"".join(buffers).count(b"GET"))
        return sendmsg(self, buffers)

    with ScriptedRedis(correct_reply) as server, closing(opened(server)) as tier:
        monkeypatch.setattr(socket.socket, "sendmsg", counted)
        for blocks, sends in ((1, [2, 1, 1, 0]), (3, [3, 1, 0, 0]), (9, [4, 0, 0, 0])):
            monkeypatch.setattr(resp, "WINDOW_NBYTES", blocks * NBYTES)
            assert loaded(tier) == [True] * 4
            assert sent == sends
            sent.clear()


def test_load_from_dripping_server_ends_at_the_deadline() -> None:
    done = threading.Event()

    def drip(_: list[bytes]) -> bytes:
        server.sockets[-1].sendall(b"$4096\r\n")
        while not done.wait(0.02):
            server.sockets[-1].sendall(b"x")
        return b""

    with ScriptedRedis(once(drip, 0)) as server, closing(opened(server, timeout_s=0.5)) as tier:
        with pytest.raises(ConnectionError, match=r"no answer in time|timed out"):
            loaded(tier)
        done.set()


def test_call_with_failing_connection_tries_once() -> None:
    with ScriptedRedis(correct_reply) as server, closing(opened(server)) as tier:
        assert loaded(tier) == [True] * 4
        server.closes_connections = True
        for connections in (2, 3):
            tier.servers.close()
            with pytest.raises(ConnectionError):
                loaded(tier)
            assert server.connections == connections


@pytest.fixture(scope="module")
def noise() -> Iterator[tuple[ScriptedRedis, RedisTier, list[bytes]]]:
    next_reply: list[bytes] = []
    with (
        ScriptedRedis(lambda _: hang_up(next_reply[0])) as server,
        closing(RedisTier(url=server.url, timeout_s=30)) as tier,
    ):
        yield server, tier, next_reply


PIECES = st.sampled_from([b"$", b"+", b"-", b":", b"*", b"\r\n", b"4096", b"-1", b"0", b"x" * 4096])


@given(st.lists(PIECES | st.binary(max_size=20), max_size=12).map(b"".join))
def test_random_reply_is_a_miss_or_the_announced_value(
    noise: tuple[ScriptedRedis, RedisTier, list[bytes]], data: bytes
) -> None:
    _, tier, next_reply = noise
    next_reply[:] = [data]
    buffer = bytearray(CLEAN)
    try:
        [written] = tier.load(KEYS[:1], [memoryview(buffer)])
    except ConnectionError:
        return
    if written and data[:1] == b"$":
        head = b"$%d\r\n" % written
        assert data.startswith(head)
        assert data[len(head) :][: written + 2] == bytes(buffer[:written]) + b"\r\n"
