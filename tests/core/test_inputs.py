"""Reading with limits: endless files, pipes, documents, calls and sockets."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache import inputs
from kvcache.inputs import (
    BoundedSocket,
    call_within,
    check_document,
    open_file,
    open_input,
    read_text,
)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "WAIT_S", 0.05)


def write(path: Path, data: bytes) -> threading.Thread:
    """Write to a pipe in a thread, which waits for a reader."""
    thread = threading.Thread(target=path.write_bytes, args=(data,))
    thread.start()
    return thread


def test_read_text_of_a_file_or_pipe_returns_its_text(tmp_path: Path) -> None:
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("é" * 50)
    assert read_text(file, 100) == "é" * 50
    os.mkfifo(pipe)
    writer = write(pipe, b"late")
    assert read_text(pipe, 100) == "late"
    writer.join()


def test_read_text_beyond_its_limit_raises(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1" * 101)
    with pytest.raises(OSError, match="it has more than 100B"):
        read_text(file, 100)


@pytest.mark.usefixtures("short")
def test_read_of_a_pipe_without_a_writer_ends(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(TimeoutError, match="nothing was written to it"):
        read_text(pipe, 100)


@pytest.mark.usefixtures("short")
def test_read_of_a_pipe_with_a_silent_writer_ends(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    holder = os.open(pipe, os.O_RDWR)
    try:
        os.write(holder, b"begun")
        with open_input(pipe) as file:
            assert file.read1(100) == b"begun"
            with pytest.raises(TimeoutError):
                file.read1(100)
    finally:
        os.close(holder)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("/dev/zero", "a device"), ("pipe", "a pipe"), ("folder", "Is a directory"), ("a\0b", "null")],
)
def test_open_file_of_another_kind_raises(kind: str, reason: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match=reason):
        os.close(open_file(tmp_path / kind, os.O_RDWR if kind == "pipe" else os.O_RDONLY))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_check_document_accepts_a_reasonable_document() -> None:
    check_document({"tier": [{"name": "l1", "capacity": 2**63, "ratio": 1e300, "more": [[1]]}]})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: {"a": 1 << 65}, "64 bits"),
        (lambda: nested(dict), "deeper"),
        (lambda: nested(list), "deeper"),
    ],
)
def test_check_document_of_an_unreasonable_document_raises(
    make: Callable[[], object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check_document(make())


def nested(kind: type) -> object:
    document: object = kind()
    for _ in range(100_000):
        document = {"a": document} if kind is dict else [document]
    return document


def test_call_within_returns_and_raises_like_the_call() -> None:
    assert call_within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 // 0)


def test_call_within_a_short_time_raises_timeout() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within"):
        call_within(0.01, never.wait)
    never.set()


@pytest.mark.parametrize("as_file", [True, False])
def test_bounded_socket_beyond_its_limits_raises(as_file: bool) -> None:
    client, server = socket.socketpair()
    with client, server:
        bounded = BoundedSocket(client, seconds=60, nbytes=10)
        file = bounded.makefile()
        receive = file.read1 if as_file else bounded.recv
        for _ in range(2):  # the limits hold for each request anew
            bounded.sendall(b"more")
            server.sendall(b"123456")
            assert receive(6) == b"123456"
        server.sendall(b"123456")
        with pytest.raises(OSError, match="an answer of more than 10B"):
            receive(6)
        bounded = BoundedSocket(client, seconds=0.01, nbytes=10)
        with pytest.raises(TimeoutError):
            bounded.recv(6)
        file.close()
