"""Resolving the name of a server takes no longer than the call that needs it has."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache.tiers.redis import sockets
from kvcache.tiers.redis.sockets import Address, open_socket
from tests.support import redis_servers
from tests.support.faulty_servers import FaultyServer, silent
from tests.support.forked_children import run_in_child


def test_name_resolution_that_hangs_ends_at_the_deadline_and_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()
    asked: list[str] = []
    getaddrinfo = socket.getaddrinfo

    def hangs(host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        over.wait(redis_servers.PATIENCE_S)
        return getaddrinfo("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    with FaultyServer(silent) as server:
        place = Address("cache.example", server.port)
        for _ in range(3):
            with pytest.raises(TimeoutError, match=r"'cache\.example' was not resolved in time"):
                open_socket(place, None, time.monotonic() + 0.05)
        over.set()
        open_socket(place, None, time.monotonic() + redis_servers.PATIENCE_S).close()
    assert len(asked) <= 2  # one that hung, and one more if that was over before the last call


def test_name_resolution_without_a_thread_fails_and_is_begun_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def resolves(_: str, port: int, **options: Any) -> list[Any]:
        return getaddrinfo("127.0.0.1", port, **options)

    getaddrinfo = socket.getaddrinfo
    with FaultyServer(silent) as server:
        monkeypatch.setattr(socket, "getaddrinfo", resolves)
        place = Address("cache.example", server.port)
        with monkeypatch.context() as scarce:
            scarce.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(OSError, match="can't start new thread"):
                open_socket(place, None, time.monotonic() + redis_servers.PATIENCE_S)
        open_socket(place, None, time.monotonic() + redis_servers.PATIENCE_S).close()


def test_name_resolution_in_a_child_waits_for_none_of_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()
    getaddrinfo = socket.getaddrinfo

    def hangs(_: str, port: int, **options: Any) -> list[Any]:
        over.wait(redis_servers.PATIENCE_S)
        return getaddrinfo("127.0.0.1", port, **options)

    def child() -> None:
        over.set()
        open_socket(place, None, time.monotonic() + redis_servers.PATIENCE_S).close()

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    with FaultyServer(silent) as server:
        place = Address("cache.example", server.port)
        with pytest.raises(TimeoutError):
            open_socket(place, None, time.monotonic() + 0.01)
        with sockets.lookups_lock:  # a thread of the parent has it when the child begins
            run_in_child(child)
        over.set()


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example"])
def test_name_that_no_host_can_have_is_an_os_error(host: str) -> None:
    with pytest.raises(OSError, match=r"name|label"):
        open_socket(Address(host), None, time.monotonic() + redis_servers.PATIENCE_S)
