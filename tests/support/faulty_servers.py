"""Servers that treat each connection as a test wants, to inject faults."""

from __future__ import annotations

import socket
from collections.abc import Callable

from tests.support.tcp_server import TcpServer, read_command

Behaviour = Callable[[socket.socket, "FaultyServer"], None]


class FaultyServer(TcpServer):
    """Calls ``behaviour(sock, self)`` for each connection.

    Attributes:
        behaviour: may be replaced; new connections get the new one.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        self.behaviour(sock, self)


def silent(sock: socket.socket, server: FaultyServer) -> None:
    """Accept everything and send nothing."""
    server.closing.wait()


def dripping(text: bytes) -> Behaviour:
    """Send ``text`` again and again, a byte at a time, faster than a timeout of one read."""

    def behave(sock: socket.socket, server: FaultyServer) -> None:
        at = 0
        while not server.closing.wait(0.02):
            sock.sendall(text[at : at + 1])
            at = (at + 1) % len(text)

    return behave


def flooding(start: bytes, then: bytes) -> Behaviour:
    """Send ``start`` once, and ``then`` as long as the client reads."""

    def behave(sock: socket.socket, server: FaultyServer) -> None:
        sock.sendall(start)
        while then and not server.closing.is_set():
            sock.sendall(then)
        server.closing.wait()

    return behave


def empty(sock: socket.socket, server: FaultyServer) -> None:
    """Behave without a fault: as a server that has no keys and accepts all writes."""
    replies = {b"EXISTS": b":0\r\n", b"GET": b"$-1\r\n", b"GETEX": b"$-1\r\n"}
    with sock.makefile("rb") as file:
        while words := read_command(file):
            sock.sendall(replies.get(words[0], b"+OK\r\n"))


def replying(*replies: bytes) -> Behaviour:
    """Send the next reply for each command; when there is one left, repeat it."""

    def behave(sock: socket.socket, server: FaultyServer) -> None:
        remaining = list(replies)
        with sock.makefile("rb") as file:
            while read_command(file):
                sock.sendall(remaining.pop(0) if len(remaining) > 1 else remaining[0])

    return behave
