"""Servers on loopback that do to each connection what a test wants: to inject faults."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from kvcache.closeable import Closeable
from tests.support.scripted_redis import read

Act = Callable[[socket.socket, "Hostile"], None]


class Hostile(Closeable):
    """Runs ``act(sock, self)`` in a thread for each connection, until the end of the block.

    Attributes:
        act: may be changed meanwhile; connections made from then on get the new one.
        over: set at the end of the block.
        connections: made so far.
    """

    def __init__(self, act: Act) -> None:
        self.act = act
        self.over = threading.Event()
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                self._threads.append(threading.Thread(target=self._run, args=(sock, self.act)))
                self._threads[-1].start()

    def _run(self, sock: socket.socket, act: Act) -> None:
        with suppress(OSError):
            act(sock, self)

    def close(self) -> None:
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._open:
            sock.close()


def silent(sock: socket.socket, server: Hostile) -> None:
    """Takes what comes and says nothing."""
    server.over.wait()


def dripping(text: bytes) -> Act:
    """Says ``text`` again and again, a byte at a time, too fast for a timeout of one read."""

    def act(sock: socket.socket, server: Hostile) -> None:
        at = 0
        while not server.over.wait(0.02):
            sock.sendall(text[at : at + 1])
            at = (at + 1) % len(text)

    return act


def flooding(start: bytes, then: bytes) -> Act:
    """Says ``start`` once, and ``then`` for as long as there is a reader."""

    def act(sock: socket.socket, server: Hostile) -> None:
        sock.sendall(start)
        while then and not server.over.is_set():
            sock.sendall(then)
        server.over.wait()

    return act


def empty(sock: socket.socket, server: Hostile) -> None:
    """No harm at all: what a server answers that holds nothing and takes everything."""
    replies = {b"EXISTS": b":0\r\n", b"GET": b"$-1\r\n", b"GETEX": b"$-1\r\n"}
    with sock.makefile("rb") as file:
        while words := read(file):
            sock.sendall(replies.get(words[0], b"+OK\r\n"))


def saying(*replies: bytes) -> Act:
    """Answers each command with the next reply, and with the last one from then on."""

    def act(sock: socket.socket, server: Hostile) -> None:
        left = list(replies)
        with sock.makefile("rb") as file:
            while read(file):
                sock.sendall(left.pop(0) if len(left) > 1 else left[0])

    return act
