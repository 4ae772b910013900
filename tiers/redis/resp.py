"""Commands and replies on one connection, payloads from and into the caller's memory.

Always true here:

* Replies belong to commands by their order and by nothing else. Whatever is not the next reply,
  whole and as RESP2 writes it, is a :class:`WireError`, and this connection is not used again.
* A payload is sent from where it lies and received where it belongs; only the few bytes that came
  with a reply's first line are copied.
* Asked for and not answered are two commands, or as many as ``WINDOW_NBYTES`` hold: enough to keep
  a server at work, too little to fill its memory with replies or to outgrow a processor's cache.
* No wait goes past the deadline, a time of ``time.monotonic()``.
* Every reply has a limit of bytes, and a list one of depth, that holds while it is read.
* What a server says reaches a message through :meth:`Wire.readable` alone.
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
from kvcache.tiers.redis.sockets import Address, left

WINDOW_NBYTES = 2 << 20

TOO_LONG = "TOOLONG"
"""The code of a value that is longer than its buffer; it was read past, and not kept."""

UNKNOWN_COMMAND = "UNKNOWNCOMMAND"
"""The code of a command that the server does not have: it may be a Sentinel."""

MAX_CLIENTS = "MAXCLIENTS"
"""The code of a server that takes no more connections now."""

_PLAIN_ERRORS = {
    "ERR unknown command": UNKNOWN_COMMAND,
    "ERR max number of clients": MAX_CLIENTS,
}
"""Errors that a server gives no code of their own, by how they begin."""

_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,240}")
_CODE = re.compile(r"[A-Z]{1,32}")
_VALUE_NBYTES = 512 << 20  # the longest value that Redis can hold
_LIST_NBYTES = 16 << 20  # of a reply with lists: the map of a cluster whose every slot is a range
_LIST_DEPTH = 8
_ITEM_NBYTES = 32  # that an item of a list counts beside its bytes, for the object it becomes
_LOCAL_SEND_NBYTES = 256 << 10  # in the kernel's hands, to a server on this machine
_LINE_NBYTES = 512  # of a reply's line: a number, or an error in words
_PARTS = 1024  # that the kernel takes in one call
_DRAIN_NBYTES = 1 << 16


class WireError(Exception):
    """What came is no reply to what was asked."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An error as the answer to one command: its first word, and all of it."""

    code: str
    text: str


Reply = int | Refused | None
"""A number, the bytes received of a value, 1 for "OK", or ``None`` for nothing there."""

Said = int | bytes | Refused | list["Said"] | None
"""A reply to :meth:`Wire.say`."""


@dataclass(frozen=True, slots=True)
class Command:
    """What is sent for one command, and where its reply's value goes."""

    parts: Sequence[bytes | memoryview]
    into: memoryview | None

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, both ways; replies of a line do not count."""
        return sum(map(len, self.parts)) + (len(self.into) if self.into is not None else 0)


def command(*words: bytes | memoryview, into: memoryview | None = None) -> Command:
    """A command of these words; those that are views are payloads, and are not copied."""
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


def address_of(host: str, port: int) -> Address:
    """The address of another server, in the words of this one. Raises WireError if it is none."""
    if not (_HOST.fullmatch(host) and 0 < port < 1 << 16):
        raise WireError("the server gives an address that cannot be one")
    return Address(host, port)


class Wire:
    """One connection.

    Args:
        sock: connected, with TLS past the handshake; it is closed with the wire.
        secrets: what no message repeats, though the server may.
    """

    def __init__(self, sock: socket.socket, secrets: Iterable[str] = ()) -> None:
        self._sock = sock
        self._secrets = tuple(secrets)
        self._room = 0  # bytes that the reply to `say` may still take
        if _is_local(self._sock):
            # Left alone, this buffer grows to megabytes, which have left the processor's cache when
            # the server reads them. To another machine it has to: bytes are under way there.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_SEND_NBYTES)
        self._early = bytearray(_LINE_NBYTES)  # received with a line, not yet used: [at, end)
        self._view = memoryview(self._early)
        self._at = self._end = 0

    def exchange(self, commands: Sequence[Command], deadline: float) -> Iterator[Reply]:
        """Send ``commands`` and give their replies in order.

        Raises:
            WireError, OSError: nothing after the replies given so far is known.
        """
        sent = waiting_nbytes = 0
        for at, command in enumerate(commands):
            parts: list[bytes | memoryview] = []
            while sent < len(commands) and (sent < at + 2 or waiting_nbytes < WINDOW_NBYTES):
                parts += commands[sent].parts
                waiting_nbytes += commands[sent].nbytes
                sent += 1
            self._send(parts, deadline)
            yield self._reply(command.into, deadline)
            waiting_nbytes -= command.nbytes

    def say(self, *words: bytes, deadline: float) -> Said:
        """The reply to one command, whatever RESP2 can say: for what is asked seldom.

        Raises:
            WireError, OSError: as :meth:`exchange`, and for a reply beyond the limits.
        """
        self._send(command(*words).parts, deadline)
        self._room = _LIST_NBYTES
        return self._said(_LIST_DEPTH, deadline)

    def readable(self, said: bytes) -> str:
        """``said`` by the server, for people: no control characters, no secrets, not long."""
        return redact(said.decode(errors="surrogateescape"), *self._secrets)

    def address(self, host: bytes, port: int) -> Address:
        """As :func:`address_of`. What would not be shown whole is no address either."""
        name = self.readable(host)
        return address_of(name if name.encode() == host else "", port)

    def quiet(self) -> bool:
        """Whether nothing came while nothing was asked. A connection that was closed is not."""
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
        views = list(_joined(parts))
        if isinstance(self._sock, ssl.SSLSocket):  # encrypts one piece at a time
            for view in views:
                self._sock.settimeout(left(deadline))
                self._sock.sendall(view)
            return
        at = 0
        while at < len(views):
            self._sock.settimeout(left(deadline))
            sent = self._sock.sendmsg(views[at : at + _PARTS])
            while at < len(views) and sent >= len(views[at]):
                sent -= len(views[at])
                at += 1
            if sent:
                views[at] = views[at][sent:]

    # Receiving

    def _reply(self, into: memoryview | None, deadline: float) -> Reply:
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return 1
        if kind == b"-":
            return self._refused(rest)
        if line == b"$-1":
            return None
        if kind not in {b":", b"$"} or not rest.isdigit():
            self._no_reply(line)
        return int(rest) if kind == b":" else self._value(int(rest), into, deadline)

    def _said(self, depth: int, deadline: float) -> Said:
        line = self._line(deadline)
        self._take(len(line) + _ITEM_NBYTES)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return self._refused(rest)
        if line in {b"$-1", b"*-1"}:
            return None
        if kind not in {b":", b"$", b"*"} or not rest.isdigit():
            self._no_reply(line)
        number = int(rest)
        if kind == b":":
            return number
        if kind == b"*":
            if not depth:
                raise WireError(f"a reply has lists within lists, {_LIST_DEPTH} deep and more")
            if number * _ITEM_NBYTES > self._room:
                self._too_long()
            return [self._said(depth - 1, deadline) for _ in range(number)]
        self._take(number)  # before there is memory for it
        value = bytearray(number)
        self._fill(memoryview(value), deadline)
        if self._line(deadline):
            raise WireError("a value does not end where it should")
        return bytes(value)

    def _take(self, nbytes: int) -> None:
        self._room -= nbytes
        if self._room < 0:
            self._too_long()

    def _too_long(self) -> NoReturn:
        raise WireError(f"a reply is longer than the {_LIST_NBYTES} bytes that are read of one")

    def _no_reply(self, line: bytes) -> NoReturn:
        raise WireError(f"a reply begins with {self.readable(line)[:16]!r}")

    def _refused(self, said: bytes) -> Refused:
        text = self.readable(said)
        for begins, code in _PLAIN_ERRORS.items():
            if text.startswith(begins):
                return Refused(code, text)
        word = text.partition(" ")[0]
        return Refused(word if _CODE.fullmatch(word) else "ERR", text)

    def _value(self, nbytes: int, into: memoryview | None, deadline: float) -> Reply:
        if into is None:
            raise WireError("a value where none was asked for")
        if nbytes > _VALUE_NBYTES:
            raise WireError("a value is longer than a server can hold")
        if nbytes <= len(into):
            self._fill(into[:nbytes], deadline)
        else:
            drain = memoryview(bytearray(_DRAIN_NBYTES))
            for at in range(0, nbytes, _DRAIN_NBYTES):
                self._fill(drain[: nbytes - at], deadline)
        if self._line(deadline):
            raise WireError("a value does not end where it should")
        if nbytes <= len(into):
            return nbytes
        return Refused(TOO_LONG, f"a value of {nbytes} bytes, {len(into)} at most are read")

    def _line(self, deadline: float) -> bytes:
        while (end := self._early.find(b"\r\n", self._at, self._end)) < 0:
            rest = self._end - self._at
            if rest == _LINE_NBYTES:
                raise WireError("a line without an end")
            self._early[:rest] = self._early[self._at : self._end]
            self._at, self._end = 0, rest
            self._end += self._receive(self._view[rest:], deadline)
        line = bytes(self._view[self._at : end])
        self._at = end + 2
        return line

    def _fill(self, view: memoryview, deadline: float) -> None:
        have = min(self._end - self._at, len(view))
        view[:have] = self._view[self._at : self._at + have]
        self._at += have
        while have < len(view):
            have += self._receive(view[have:], deadline)

    def _receive(self, view: memoryview, deadline: float) -> int:
        self._sock.settimeout(left(deadline))
        nbytes: int = self._sock.recv_into(view)
        if not nbytes:
            raise WireError("the server closed the connection")
        return nbytes


def _is_local(sock: socket.socket) -> bool:
    """Whether the other end is on this machine, by TCP."""
    tcp = sock.family in {socket.AF_INET, socket.AF_INET6}
    return tcp and ip_address(sock.getpeername()[0]).is_loopback


def _joined(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """``parts`` with the small ones between two payloads as one."""
    small = bytearray()
    for part in parts:
        if isinstance(part, memoryview):
            yield memoryview(small)
            yield part
            small = bytearray()
        else:
            small += part
    yield memoryview(small)
