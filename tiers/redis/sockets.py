"""Connected sockets: name resolution, connect and TLS handshake, all within one deadline."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

lookups: dict[tuple[str, int], Future[list[Any]]] = {}
"""Name resolutions in progress. If one hangs, later calls wait for it, and start no other."""

lookups_lock = threading.Lock()
"""Guards ``lookups``."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host and its port, or the path of a Unix socket."""

    host: str = ""
    port: int = 6379
    path: str = ""

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


def remaining_s(deadline: float) -> float:
    """Return the seconds until ``deadline``; raise TimeoutError if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("no answer in time")
    return seconds


def half_deadline(deadline: float) -> float:
    """Return a deadline after half of the remaining time, which leaves time for a second try."""
    return deadline - remaining_s(deadline) / 2


def open_socket(address: Address, tls: ssl.SSLContext | None, deadline: float) -> socket.socket:
    """Return a connected socket; with ``tls`` the handshake is complete.

    Args:
        address: where to connect.
        tls: the context of a TLS connection; ``None`` connects without TLS.
        deadline: a time of ``time.monotonic()``.

    Raises:
        OSError: there was no connection by ``deadline``.
    """
    if address.path:
        return _connect(socket.AF_UNIX, address.path, deadline)
    *others, last = _resolve(address.host, address.port, deadline)
    for family, _, _, _, socket_address in others:
        try:
            sock = _connect(family, socket_address, half_deadline(deadline))
            break
        except OSError:
            continue
    else:
        sock = _connect(last[0], last[4], deadline)
    try:
        if tls is not None:
            sock.settimeout(remaining_s(deadline))  # for the whole handshake, not for each read
            sock = tls.wrap_socket(sock, server_hostname=address.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(family: int, socket_address: Any, deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(remaining_s(deadline))
        sock.connect(socket_address)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """Return the result of ``getaddrinfo``, which has no timeout, so a thread calls it."""
    try:
        ip_address(host)
    except ValueError:
        pass
    else:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    name = host, port
    with lookups_lock:
        lookup = lookups.get(name)
        if lookup is None:
            lookup = Future()
            thread = threading.Thread(
                target=_look_up, args=name, name="kvcache-redis-resolve", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # the process or the system has too many threads
                raise OSError(f"the name {host!r} was not resolved: {error}") from None
            lookups[name] = lookup
    try:
        return lookup.result(remaining_s(deadline))
    except TimeoutError:
        raise TimeoutError(f"the name {host!r} was not resolved in time") from None


def _look_up(host: str, port: int) -> None:
    result: list[Any] = []
    error: BaseException | None = None
    try:
        result = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        error = OSError(f"{host!r} is not a valid host name")
    except BaseException as failed:  # noqa: BLE001 - raised by the calls that wait for the result
        error = failed
    with lookups_lock:
        lookup = lookups.pop((host, port))
    if error is not None:
        lookup.set_exception(error)
    else:
        lookup.set_result(result)


def _begin_child() -> None:
    """In a forked child: drop the lookups of the parent's threads, which do not run here."""
    global lookups_lock
    lookups_lock = threading.Lock()
    lookups.clear()


os.register_at_fork(after_in_child=_begin_child)
