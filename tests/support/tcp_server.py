"""A TCP server on loopback that serves each connection in a thread."""

from __future__ import annotations

import socket
import threading
from abc import abstractmethod
from contextlib import suppress
from typing import BinaryIO

from kvcache.closeable import Closeable


class TcpServer(Closeable):
    """Calls :meth:`serve` for each connection, until it is closed.

    Attributes:
        port: the port on 127.0.0.1.
        sockets: of all connections that were made, the newest last.
        closing: set when the server is being closed.
    """

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    @abstractmethod
    def serve(self, sock: socket.socket) -> None:
        """Serve one connection; the server closes it. An OSError ends it."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections were made."""
        return len(self.sockets)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.sockets.append(sock)
                thread = threading.Thread(target=self._run, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _run(self, sock: socket.socket) -> None:
        with suppress(OSError):
            self.serve(sock)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for sock in self.sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self.sockets:
            sock.close()


def read_command(file: BinaryIO) -> list[bytes]:
    """Return the words of the next Redis command; an empty list at the end of the stream."""
    line = file.readline()
    if not line:
        return []
    words = []
    for _ in range(int(line[1:])):
        nbytes = int(file.readline()[1:])
        words.append(file.read(nbytes))
        file.read(2)
    return words
