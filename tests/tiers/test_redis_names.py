"""open_socket: name resolution ends by the deadline of its call."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

pytest.importorskip("redis")

from kvcache.tiers.redis import sockets
from kvcache.tiers.redis.sockets import Address, open_socket
from tests.support.faulty_servers import FaultyServer, silent
from tests.support.forked_children import run_in_child
from tests.support.waiting import PATIENCE_S


def test_hanging_name_resolution_ends_at_the_deadline_and_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    resolved: list[str] = []
    getaddrinfo = socket.getaddrinfo

    def hangs(host: str, port: int, **options: Any) -> list[Any]:
        resolved.append(host)
        released.wait(PATIENCE_S)
        return getaddrinfo("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    with FaultyServer(silent) as server:
        address = Address("cache.example", server.port)
        for _ in range(3):
            with pytest.raises(TimeoutError, match=r"'cache\.example' was not resolved in time"):
                open_socket(address, None, time.monotonic() + 0.05)
        released.set()
        open_socket(address, None, time.monotonic() + PATIENCE_S).close()
    assert len(resolved) <= 2  # a second one only if the first ended before the last call


def test_name_resolution_without_a_thread_raises_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def resolves(_: str, port: int, **options: Any) -> list[Any]:
        return getaddrinfo("127.0.0.1", port, **options)

    getaddrinfo = socket.getaddrinfo
    with FaultyServer(silent) as server:
        monkeypatch.setattr(socket, "getaddrinfo", resolves)
        address = Address("cache.example", server.port)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(OSError, match="can't start new thread"):
                open_socket(address, None, time.monotonic() + PATIENCE_S)
        open_socket(address, None, time.monotonic() + PATIENCE_S).close()


def test_name_resolution_in_forked_child_does_not_wait_for_the_parents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    getaddrinfo = socket.getaddrinfo

    def hangs(_: str, port: int, **options: Any) -> list[Any]:
        released.wait(PATIENCE_S)
        return getaddrinfo("127.0.0.1", port, **options)

    def child() -> None:
        released.set()
        open_socket(address, None, time.monotonic() + PATIENCE_S).close()

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    with FaultyServer(silent) as server:
        address = Address("cache.example", server.port)
        with pytest.raises(TimeoutError):
            open_socket(address, None, time.monotonic() + 0.01)
        with sockets.lookups_lock:  # as if another thread held it at the fork
            run_in_child(child)
        released.set()


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example"])
def test_invalid_host_name_raises_os_error(host: str) -> None:
    with pytest.raises(OSError, match=r"name|label"):
        open_socket(Address(host), None, time.monotonic() + PATIENCE_S)
