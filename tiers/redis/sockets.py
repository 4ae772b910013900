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

_lookups: dict[tuple[str, int], Future[list[Any]]] = {}
"""Name resolutions in progress. One that hangs is waited for again, and not started again."""

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Address:
    """A host and its port, or the path of a Unix socket."""

    host: str = ""
    port: int = 6379
    path: str = ""

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


def left(deadline: float) -> float:
    """Seconds until ``deadline``. Raises TimeoutError when there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("no answer in time")
    return seconds


def halfway(deadline: float) -> float:
    """The deadline of an attempt that leaves time for another one."""
    return deadline - left(deadline) / 2


def open_socket(address: Address, tls: ssl.SSLContext | None, deadline: float) -> socket.socket:
    """A socket that is connected to ``address``, with ``tls`` past the handshake.

    Raises:
        OSError: it cannot be had by ``deadline``, a time of ``time.monotonic()``.
    """
    if address.path:
        return _connected(socket.AF_UNIX, address.path, deadline)
    *others, last = _resolved(address.host, address.port, deadline)
    for family, _, _, _, where in others:
        try:
            sock = _connected(family, where, halfway(deadline))
            break
        except OSError:
            continue
    else:
        sock = _connected(last[0], last[4], deadline)
    try:
        if tls is not None:
            sock.settimeout(left(deadline))  # of the whole handshake, not of each read in it
            sock = tls.wrap_socket(sock, server_hostname=address.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _connected(family: int, where: Any, deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(left(deadline))
        sock.connect(where)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _resolved(host: str, port: int, deadline: float) -> list[Any]:
    """What ``getaddrinfo`` gives. It takes no timeout, so a name is resolved in a thread."""
    try:
        ip_address(host)
    except ValueError:
        pass
    else:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    place = host, port
    with _lock:
        lookup = _lookups.get(place)
        if lookup is None:
            lookup, name = Future(), "kvcache-redis-resolve"
            thread = threading.Thread(target=_look_up, args=place, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread left
                raise OSError(f"the name {host!r} was not resolved: {error}") from None
            _lookups[place] = lookup
    try:
        return lookup.result(left(deadline))
    except TimeoutError:
        raise TimeoutError(f"the name {host!r} was not resolved in time") from None


def _look_up(host: str, port: int) -> None:
    found: list[Any] = []
    error: BaseException | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        error = OSError(f"{host!r} is not a name of a host")
    except BaseException as failed:  # noqa: BLE001 - raised where the result is asked for
        error = failed
    with _lock:
        lookup = _lookups.pop((host, port))
    if error is not None:
        lookup.set_exception(error)
    else:
        lookup.set_result(found)


def _begin_child() -> None:
    """Forget, in a forked child, what threads of its parent resolve: they do not run there."""
    global _lock
    _lock = threading.Lock()
    _lookups.clear()


os.register_at_fork(after_in_child=_begin_child)
