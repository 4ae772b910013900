"""A server that speaks Redis's protocol and answers what a test tells it to: to inject faults."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from kvcache.closeable import Closeable


class Hangup(Exception):  # noqa: N818 - no error
    """Raised by a script: send the bytes given, then close the connection."""


class Scripted(Closeable):
    """Sends what ``script(words)`` gives for each command; the greeting is answered as usual.

    Attributes:
        heard: commands in the order in which they came, all connections together.
        connections: made so far.
        hangs_up: on whoever connects from now on.
    """

    def __init__(self, script: Callable[[list[bytes]], bytes]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.heard: list[list[bytes]] = []
        self.connections = 0
        self.hangs_up = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        with suppress(OSError), sock, sock.makefile("rb") as file:
            try:
                while not self.hangs_up and (words := read(file)):
                    if words[0] == b"CLIENT":
                        sock.sendall(b"+OK\r\n")
                    elif words[-1].startswith(b"kvcache:1:start:"):
                        sock.sendall(b":0\r\n")
                    else:
                        self.heard.append(words)
                        sock.sendall(self._script(words))
            except Hangup as last:
                sock.sendall(*last.args)

    def close(self) -> None:
        self._listener.close()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def read(file: BinaryIO) -> list[bytes]:
    """The words of the next command; none at the end."""
    line = file.readline()
    if not line:
        return []
    words = []
    for _ in range(int(line[1:])):
        nbytes = int(file.readline()[1:])
        words.append(file.read(nbytes))
        file.read(2)
    return words
