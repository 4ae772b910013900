"""A Redis server with replies from a test's script, to inject faults."""

from __future__ import annotations

import socket
from collections.abc import Callable

from tests.support.tcp_server import TcpServer, read_command


class CloseConnection(Exception):  # noqa: N818 - not an error
    """Raised by a script: send the given bytes, then close the connection."""


class ScriptedRedis(TcpServer):
    """Sends the result of ``script(words)`` for each command; the login is answered with OK.

    Attributes:
        commands: the words of each command, of all connections, in the order of arrival.
        closes_connections: close every connection that is made from now on.
    """

    def __init__(self, script: Callable[[list[bytes]], bytes]) -> None:
        self._script = script
        self.commands: list[list[bytes]] = []
        self.closes_connections = False
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as file:
            try:
                while not self.closes_connections and (words := read_command(file)):
                    if words[0] == b"CLIENT":
                        sock.sendall(b"+OK\r\n")
                    elif words[-1].startswith(b"kvcache:1:start:"):
                        sock.sendall(b":0\r\n")
                    else:
                        self.commands.append(words)
                        sock.sendall(self._script(words))
            except CloseConnection as error:
                sock.sendall(*error.args)
