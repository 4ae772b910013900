"""Reads files, sockets and documents of people and other programs, with limits on size and time.

Invariant: every function returns or raises within its limits, whatever a path leads to (a pipe
without a writer, an endless device) and whatever a server does (silence, endless output).
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
"""Seconds that a pipe may send nothing, and that reading a whole text may take."""
DEPTH: Final = 50
"""How deeply the tables and lists of a document may be nested."""
MAX_TIMEOUT_S: Final = 3600
"""The largest timeout that a tier takes."""

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
    """Open a regular file, and never block on a path to something else.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
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

    A read from a pipe raises TimeoutError if nothing is written to it for ``WAIT_S`` seconds.

    Raises:
        OSError: if it cannot be opened, or is neither.
    """
    file = _open(path, os.O_RDONLY, 0)
    try:
        check_regular(file, pipes=True)
    except OSError:
        os.close(file)
        raise
    return io.BufferedReader(_TimedFile(file))


def read_text(path: Path, limit: int) -> str:
    """Return the text of a regular file or a pipe, in UTF-8.

    Args:
        path: the file or pipe.
        limit: the most bytes that it may have.

    Raises:
        OSError: if it cannot be read, has more bytes, or takes more than ``WAIT_S`` seconds.
        UnicodeDecodeError: if it is not UTF-8.
    """
    deadline = time.monotonic() + WAIT_S
    pieces, size = [], 0
    with open_input(path) as file:
        while piece := file.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise OSError(errno.EFBIG, f"it has more than {format_size(limit)}")
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"it did not end within {WAIT_S:g} s")
    return b"".join(pieces).decode("utf-8")


def check_document(document: object) -> None:
    """Raise ValueError if a TOML or JSON document is unreasonable.

    That is: tables or lists nested deeper than ``DEPTH``, or an integer of more than 64 bits.
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
    """Run ``call`` in a thread, and return its result or raise its exception.

    Raises:
        TimeoutError: if it did not end within ``seconds``. Its thread goes on in the background.
    """
    outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            outcome.put((None, error))

    threading.Thread(target=run, name="kvcache-within", daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


class BoundedSocket:
    """A connected socket with limits on the size and time of each response.

    A response begins when something is sent. All methods but those that receive are those of the
    socket.

    Args:
        sock: a TCP, TLS or Unix socket.
        seconds: the most time from the request to the last byte of its response.
        nbytes: the most bytes of a response.
    """

    def __init__(self, sock: Any, *, seconds: float, nbytes: int) -> None:
        self._sock = sock
        self._seconds = seconds
        self.nbytes = nbytes
        self._begin_response()

    def _begin_response(self) -> None:
        self._deadline = time.monotonic() + self._seconds
        self._received = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: bytes, *flags: int) -> None:
        """Send a request, or the next part of one."""
        self._begin_response()
        self._sock.sendall(data, *flags)

    def recv(self, size: int) -> bytes:
        """Receive like a socket. Raises OSError beyond a limit."""
        self._limit_wait()
        data: bytes = self._sock.recv(size)
        self._count_received(len(data))
        return data

    def recv_into(self, buffer: memoryview, *size: int) -> int:
        """Receive like a socket. Raises OSError beyond a limit."""
        return self.bounded(lambda: self._sock.recv_into(buffer, *size))

    def makefile(self, mode: str = "rb", *_: object) -> io.BufferedReader:
        """Return a file that reads what is received."""
        # The inner file keeps the socket open, also if the socket object is closed meanwhile.
        return io.BufferedReader(_BoundedFile(self, self._sock.makefile("rb", buffering=0)))

    def bounded(self, receive: Callable[[], int]) -> int:
        """Call ``receive``, which returns how many bytes it got. Raises OSError beyond a limit."""
        self._limit_wait()
        length = receive()
        self._count_received(length)
        return length

    def _limit_wait(self) -> None:
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"no whole answer within {self._seconds:g} s")
        self._sock.settimeout(remaining_s)

    def _count_received(self, length: int) -> None:
        self._received += length
        if self._received > self.nbytes:
            raise OSError(errno.EFBIG, f"an answer of more than {format_size(self.nbytes)}")


class _BoundedFile(io.RawIOBase):
    """The receiving side of a ``BoundedSocket`` as a raw file."""

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


class _TimedFile(io.FileIO):
    """A file with a limit of ``WAIT_S`` seconds on each read."""

    def __init__(self, file: int) -> None:
        super().__init__(file, "rb")
        self._poll = select.poll()
        self._poll.register(file, select.POLLIN)

    def readinto(self, buffer: Any) -> int:
        # poll() also waits for the first writer of a pipe; read() would report the end of the file.
        if not self._poll.poll(WAIT_S * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"nothing was written to it for {WAIT_S:g} s")
        return super().readinto(buffer) or 0


def _open(path: Path, flags: int, mode: int) -> int:
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, mode)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None


def check_files(**files: str) -> None:
    """Raise ValueError for the first option with a path that is not a readable file."""
    for name, path in files.items():
        if path and not (Path(path).is_file() and os.access(path, os.R_OK)):
            raise ValueError(f"{name} is {path!r}, which is not a readable file")


def check_timeout(timeout_s: float) -> None:
    """Raise ValueError unless a tier can end its calls after ``timeout_s`` seconds."""
    if not 0 < timeout_s <= MAX_TIMEOUT_S:  # false for nan
        raise ValueError(f"timeout_s is {timeout_s}; it takes seconds above 0, to {MAX_TIMEOUT_S}")
