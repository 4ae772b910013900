"""Reads what people and other programs wrote, within limits: the kind of file, bytes, time, depth.

Always true: every function here returns or raises within its limits, whatever a path leads to (a
pipe without a writer, a device that never ends) and whatever a server does (silence, a flood).
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from kvcache.sizes import format_size

T = TypeVar("T")

WAIT_S: Final = 5.0
"""Seconds that a pipe may be silent, or take for a text that is read as a whole."""
DEPTH: Final = 50
"""Tables or lists within each other, at most, in a document that people write."""

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(file: int, *, pipes: bool = False) -> None:
    """Raise OSError if the open file is neither a regular file nor, with ``pipes``, a pipe."""
    mode = os.fstat(file).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise OSError(errno.EINVAL, f"it is {kind}, and must be a regular file")


def open_file(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """Open a regular file, without waiting for whatever else the path may lead to.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    file = _open(path, flags, mode)
    try:
        check_regular(file)
    except OSError:
        os.close(file)
        raise
    return file


def open_input(path: Path) -> io.BufferedReader:
    """Open a regular file or a pipe to read.

    Each read of a pipe raises TimeoutError when nothing was written to it for ``WAIT_S`` seconds.

    Raises:
        OSError: it cannot be opened, or is neither.
    """
    file = _open(path, os.O_RDONLY, 0)
    try:
        check_regular(file, pipes=True)
    except OSError:
        os.close(file)
        raise
    return io.BufferedReader(_Patient(file))


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file or a pipe, of at most ``limit`` bytes, in UTF-8.

    Raises:
        OSError: it cannot be read, has more bytes, or took more than ``WAIT_S`` seconds.
        UnicodeDecodeError: it is not UTF-8.
    """
    until = time.monotonic() + WAIT_S
    pieces, size = [], 0
    with open_input(path) as file:
        while piece := file.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise OSError(errno.EFBIG, f"it has more than {format_size(limit)}")
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, f"it did not end within {WAIT_S:g} s")
    return b"".join(pieces).decode("utf-8")


def check_document(document: object) -> None:
    """Raise ValueError if what a TOML or JSON reader returned is beyond what people write.

    That is more than ``DEPTH`` tables or lists within each other, or an integer of more than 64
    bits.
    """
    level = [document]
    for _ in range(DEPTH + 1):
        inner: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, int) and value.bit_length() > 64:
                raise ValueError("a number in it has more than 64 bits")
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {DEPTH} levels")


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, if it ends in time. Else it is left behind in its thread.

    Raises:
        TimeoutError: it did not end within ``seconds``.
    """
    answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            answer.put((None, error))

    threading.Thread(target=run, name="kvcache-within", daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


class BoundedSocket:
    """A connected socket whose peer has so many bytes and seconds for each answer.

    An answer begins when something is sent. Everything but receiving is the socket's own.

    Args:
        sock: a TCP, TLS or Unix socket.
        seconds: from the request to the last byte of its answer.
        nbytes: of an answer, at most.
    """

    def __init__(self, sock: Any, *, seconds: float, nbytes: int) -> None:
        self._sock = sock
        self._seconds = seconds
        self.nbytes = nbytes
        self._begin()

    def _begin(self) -> None:
        self._until = time.monotonic() + self._seconds
        self._received = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: bytes, *flags: int) -> None:
        """Send a request, or the next part of one."""
        self._begin()
        self._sock.sendall(data, *flags)

    def recv(self, size: int) -> bytes:
        """Receive, as a socket does. Raises OSError beyond a limit."""
        self._wait()
        data: bytes = self._sock.recv(size)
        self._count(len(data))
        return data

    def recv_into(self, buffer: memoryview, *size: int) -> int:
        """Receive, as a socket does. Raises OSError beyond a limit."""
        return self.bounded(lambda: self._sock.recv_into(buffer, *size))

    def makefile(self, mode: str = "rb", *_: object) -> io.BufferedReader:
        """What is received, as a file to read."""
        # The socket stays open for this file, also when it is closed meanwhile.
        return io.BufferedReader(_Received(self, self._sock.makefile("rb", buffering=0)))

    def bounded(self, receive: Callable[[], int]) -> int:
        """Do ``receive``, which returns the bytes it received. Raises OSError beyond a limit."""
        self._wait()
        length = receive()
        self._count(length)
        return length

    def _wait(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"no whole answer within {self._seconds:g} s")
        self._sock.settimeout(left)

    def _count(self, length: int) -> None:
        self._received += length
        if self._received > self.nbytes:
            raise OSError(errno.EFBIG, f"an answer of more than {format_size(self.nbytes)}")


class _Received(io.RawIOBase):
    def __init__(self, sock: BoundedSocket, file: io.RawIOBase) -> None:
        self._sock = sock
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.bounded(lambda: self._file.readinto(buffer) or 0)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Patient(io.FileIO):
    """A file whose every read ends within ``WAIT_S`` seconds."""

    def __init__(self, file: int) -> None:
        super().__init__(file, "rb")
        self._poll = select.poll()
        self._poll.register(file, select.POLLIN)

    def readinto(self, buffer: Any) -> int:
        # poll() waits for a first writer of a pipe; without one, read() would report the end.
        if not self._poll.poll(WAIT_S * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"nothing was written to it for {WAIT_S:g} s")
        return super().readinto(buffer) or 0


def _open(path: Path, flags: int, mode: int) -> int:
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, mode)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None
