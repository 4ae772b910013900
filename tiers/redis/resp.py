"""RESP2 on one connection: commands and replies, payloads from and into the caller's memory.

Invariants:

* Replies are matched to commands by their order alone. Anything but a whole, valid next reply is a
  :class:`ProtocolError`, and the connection is not used again.
* A payload is sent from the caller's memory and received into it. Only the few bytes that arrive
  together with the first line of a reply are copied.
* At most two commands, or as many as fit in ``WINDOW_NBYTES``, wait for a reply. This keeps a
  server busy, without filling its memory with replies or exceeding a CPU's cache.
* No wait exceeds the deadline, a time of ``time.monotonic()``.
* The bytes of a reply and the depth of its lists are limited while it is read.
* Messages contain a server's text only as :meth:`RespConnection.printable` returns it.
"""

from __future__ import annotations

import re
import select
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import NoReturn

from kvcache.secrets import redact
from kvcache.tiers.redis.sockets import Address, remaining_s

WINDOW_NBYTES = 2 << 20

TOO_LONG = "TOOLONG"
"""The code of a value that is longer than its buffer; it was read and discarded."""

UNKNOWN_COMMAND = "UNKNOWNCOMMAND"
"""The code of a command that the server does not know: it may be a Sentinel."""

MAX_CLIENTS = "MAXCLIENTS"
"""The code of a server that accepts no more connections for now."""

_ERRORS_WITHOUT_CODE = {
    "ERR unknown command": UNKNOWN_COMMAND,
    "ERR max number of clients": MAX_CLIENTS,
}
"""Codes for errors to which Redis gives no code of their own, by the beginning of the text."""

_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,240}")
_CODE = re.compile(r"[A-Z]{1,32}")
_MAX_VALUE_NBYTES = 512 << 20  # the largest value that Redis can hold
_MAX_CALL_REPLY_NBYTES = 16 << 20  # enough for a cluster in which every slot is a range
_MAX_LIST_DEPTH = 8
_ITEM_NBYTES = 32  # counted for each item of a list, for its Python object
_LOCAL_SEND_NBYTES = 256 << 10  # the kernel's send buffer, for a server on this machine
_MAX_LINE_NBYTES = 512  # a number, or the text of an error
_MAX_SEND_PARTS = 1024  # per system call
_DRAIN_NBYTES = 1 << 16


class ProtocolError(Exception):
    """The server sent something that is not a reply to the command."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A server's error as the reply to one command: its code (the first word), and its text."""

    code: str
    text: str


Reply = int | ErrorReply | None
"""A number, the number of bytes of a value, 1 for "OK", or ``None`` for a missing value."""

AnyReply = int | bytes | ErrorReply | list["AnyReply"] | None
"""A reply to :meth:`RespConnection.call`."""


@dataclass(frozen=True, slots=True)
class Command:
    """The bytes to send for one command, and the buffer for the value of its reply."""

    parts: Sequence[bytes | memoryview]
    into: memoryview | None

    @property
    def nbytes(self) -> int:
        """Bytes sent and received; replies of one line do not count."""
        return sum(map(len, self.parts)) + (len(self.into) if self.into is not None else 0)


def command(*words: bytes | memoryview, into: memoryview | None = None) -> Command:
    """Return the command of ``words``; words that are memoryviews are not copied."""
    parts: list[bytes | memoryview] = []
    small = b"*%d\r\n" % len(words)
    for word in words:
        small += b"$%d\r\n" % len(word)
        if isinstance(word, memoryview):
            parts += [small, word]
            small = b"\r\n"
        else:
            small += word + b"\r\n"
    return Command([*parts, small], into)


def parse_address(host: str, port: int) -> Address:
    """Return an address that a server sent; raise ProtocolError if it is invalid."""
    if not (_HOST.fullmatch(host) and 0 < port < 1 << 16):
        raise ProtocolError("the server returned an invalid address")
    return Address(host, port)


class RespConnection:
    """A connection to one server.

    Args:
        sock: a connected socket; with TLS, after the handshake. It is closed with this object.
        secrets: texts that must not be in a message, even if the server repeats them.
    """

    def __init__(self, sock: socket.socket, secrets: Iterable[str] = ()) -> None:
        self._sock = sock
        self._secrets = tuple(secrets)
        self._reply_room = 0  # bytes that the reply to `call` may still have
        if _is_local(self._sock):
            # Otherwise the kernel lets this buffer grow to megabytes, and the data has left the
            # CPU's cache before the server reads it. A connection to another machine needs that.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_SEND_NBYTES)
        self._buffer = bytearray(_MAX_LINE_NBYTES)  # received and not used yet: [at, end)
        self._view = memoryview(self._buffer)
        self._at = self._end = 0

    def exchange(self, commands: Sequence[Command], deadline: float) -> Iterator[Reply]:
        """Send ``commands`` and yield their replies in order.

        Raises:
            ProtocolError, OSError: the replies that were not yielded yet are lost.
        """
        sent = unanswered_nbytes = 0
        for at, command in enumerate(commands):
            parts: list[bytes | memoryview] = []
            while sent < len(commands) and (sent < at + 2 or unanswered_nbytes < WINDOW_NBYTES):
                parts += commands[sent].parts
                unanswered_nbytes += commands[sent].nbytes
                sent += 1
            self._send(parts, deadline)
            yield self._read_reply(command.into, deadline)
            unanswered_nbytes -= command.nbytes

    def call(self, *words: bytes, deadline: float) -> AnyReply:
        """Send one command and return its reply, of any kind that RESP2 has; for rare commands.

        Raises:
            ProtocolError, OSError: as :meth:`exchange`, and for a reply that exceeds the limits.
        """
        self._send(command(*words).parts, deadline)
        self._reply_room = _MAX_CALL_REPLY_NBYTES
        return self._read_any(_MAX_LIST_DEPTH, deadline)

    def printable(self, text: bytes) -> str:
        """Return text of the server without control characters and secrets, cut if it is long."""
        return redact(text.decode(errors="surrogateescape"), *self._secrets)

    def parse_address(self, host: bytes, port: int) -> Address:
        """As :func:`parse_address`; a host that :meth:`printable` would change is invalid too."""
        name = self.printable(host)
        return parse_address(name if name.encode() == host else "", port)

    def is_idle(self) -> bool:
        """Whether the server has sent nothing and has not closed the connection."""
        decrypted = self._sock.pending() if isinstance(self._sock, ssl.SSLSocket) else 0
        if decrypted or self._at != self._end:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._sock.close()

    # Sending

    def _send(self, parts: Iterable[bytes | memoryview], deadline: float) -> None:
        views = list(_join(parts))
        if isinstance(self._sock, ssl.SSLSocket):  # encrypts one piece at a time
            for view in views:
                self._sock.settimeout(remaining_s(deadline))
                self._sock.sendall(view)
            return
        at = 0
        while at < len(views):
            self._sock.settimeout(remaining_s(deadline))
            sent = self._sock.sendmsg(views[at : at + _MAX_SEND_PARTS])
            while at < len(views) and sent >= len(views[at]):
                sent -= len(views[at])
                at += 1
            if sent:
                views[at] = views[at][sent:]

    # Receiving

    def _read_reply(self, into: memoryview | None, deadline: float) -> Reply:
        line = self._read_line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return 1
        if kind == b"-":
            return self._error_reply(rest)
        if line == b"$-1":
            return None
        if kind not in {b":", b"$"} or not rest.isdigit():
            self._raise_invalid(line)
        return int(rest) if kind == b":" else self._read_value(int(rest), into, deadline)

    def _read_any(self, depth: int, deadline: float) -> AnyReply:
        line = self._read_line(deadline)
        self._count(len(line) + _ITEM_NBYTES)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return self._error_reply(rest)
        if line in {b"$-1", b"*-1"}:
            return None
        if kind not in {b":", b"$", b"*"} or not rest.isdigit():
            self._raise_invalid(line)
        number = int(rest)
        if kind == b":":
            return number
        if kind == b"*":
            if not depth:
                raise ProtocolError(f"a reply has lists nested deeper than {_MAX_LIST_DEPTH}")
            if number * _ITEM_NBYTES > self._reply_room:
                self._raise_too_long()
            return [self._read_any(depth - 1, deadline) for _ in range(number)]
        self._count(number)  # before memory is allocated for it
        value = bytearray(number)
        self._receive_into(memoryview(value), deadline)
        if self._read_line(deadline):
            raise ProtocolError("a value has another length than announced")
        return bytes(value)

    def _count(self, nbytes: int) -> None:
        self._reply_room -= nbytes
        if self._reply_room < 0:
            self._raise_too_long()

    def _raise_too_long(self) -> NoReturn:
        raise ProtocolError(f"a reply has more than {_MAX_CALL_REPLY_NBYTES} bytes")

    def _raise_invalid(self, line: bytes) -> NoReturn:
        raise ProtocolError(f"a reply begins with {self.printable(line)[:16]!r}")

    def _error_reply(self, line: bytes) -> ErrorReply:
        text = self.printable(line)
        for beginning, code in _ERRORS_WITHOUT_CODE.items():
            if text.startswith(beginning):
                return ErrorReply(code, text)
        word = text.partition(" ")[0]
        return ErrorReply(word if _CODE.fullmatch(word) else "ERR", text)

    def _read_value(self, nbytes: int, into: memoryview | None, deadline: float) -> Reply:
        if into is None:
            raise ProtocolError("a reply is a value, which the command does not return")
        if nbytes > _MAX_VALUE_NBYTES:
            raise ProtocolError("a value is longer than Redis allows")
        if nbytes <= len(into):
            self._receive_into(into[:nbytes], deadline)
        else:
            drain = memoryview(bytearray(_DRAIN_NBYTES))
            for at in range(0, nbytes, _DRAIN_NBYTES):
                self._receive_into(drain[: nbytes - at], deadline)
        if self._read_line(deadline):
            raise ProtocolError("a value has another length than announced")
        if nbytes <= len(into):
            return nbytes
        return ErrorReply(TOO_LONG, f"a value has {nbytes} bytes; the buffer has {len(into)}")

    def _read_line(self, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._at, self._end)) < 0:
            unused = self._end - self._at
            if unused == _MAX_LINE_NBYTES:
                raise ProtocolError("a line is too long")
            self._buffer[:unused] = self._buffer[self._at : self._end]
            self._at, self._end = 0, unused
            self._end += self._receive(self._view[unused:], deadline)
        line = bytes(self._view[self._at : end])
        self._at = end + 2
        return line

    def _receive_into(self, view: memoryview, deadline: float) -> None:
        received = min(self._end - self._at, len(view))
        view[:received] = self._view[self._at : self._at + received]
        self._at += received
        while received < len(view):
            received += self._receive(view[received:], deadline)

    def _receive(self, view: memoryview, deadline: float) -> int:
        self._sock.settimeout(remaining_s(deadline))
        nbytes: int = self._sock.recv_into(view)
        if not nbytes:
            raise ProtocolError("the server closed the connection")
        return nbytes


def _is_local(sock: socket.socket) -> bool:
    """Whether this is a TCP connection to this machine."""
    tcp = sock.family in {socket.AF_INET, socket.AF_INET6}
    return tcp and ip_address(sock.getpeername()[0]).is_loopback


def _join(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Yield ``parts``, with the small ones between two payloads joined."""
    small = bytearray()
    for part in parts:
        if isinstance(part, memoryview):
            yield memoryview(small)
            yield part
            small = bytearray()
        else:
            small += part
    yield memoryview(small)
