"""FaultyServer inputs for commands: files, and servers with invalid or endless answers."""

from __future__ import annotations

import gzip
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NESTED = 100_000


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _levels(path: Path) -> None:
    """Write 1,200 profiles that extend each other."""
    folder = path.with_suffix(".levels")
    folder.mkdir()
    for level in range(1200):
        (folder / f"{level}.toml").write_text(f'extends = "{level + 1}.toml"\n')
    path.symlink_to(folder / "0.toml")


def _writer(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda path: path.write_bytes(data)


FILES: dict[str, Callable[[Path], object]] = {
    "pipe": _pipe,
    "socket": _socket,
    "directory": Path.mkdir,
    "no-file": lambda path: None,
    "dangling-link": lambda path: path.symlink_to("nowhere"),
    "link-to-itself": lambda path: path.symlink_to(path),
    "dev-zero": lambda path: path.symlink_to("/dev/zero"),
    "dev-full": lambda path: path.symlink_to("/dev/full"),
    "sparse": _sparse,
    "empty": _writer(""),
    "binary": _writer(os.urandom(4096)),
    "control-characters": _writer("\x1b[31m = \x1b]0;title\x07\n"),
    "one-long-line": _writer("a" * (40 << 20)),
    "deep-lists": _writer("[" * NESTED),
    "deep-closed-lists": _writer("a = " + "[" * 300 + "]" * 300),
    "deep-json": _writer('{"num_hidden_layers": ' + "[" * 900 + "]" * 900 + "}"),
    "deep-tables": _writer("[a" + ".a" * 20_000 + "]\n"),
    "deep-keys": _writer("a" + ".a" * 20_000 + " = 1\n"),
    "long-number": _writer("a = 0x" + "f" * 20_000 + "\n"),
    "long-decimal": _writer('{"num_hidden_layers": ' + "9" * 10_000 + "}"),
    "wrong-types": _writer('{"architectures": 5, "layer_types": 7, "num_hidden_layers": [1]}'),
    "null-in-a-path": _writer('extends = "\\u0000/a.toml"\n'),
    "extends-levels": _levels,
    "extends-itself": lambda path: path.write_text(f'extends = "{path}"\n'),
    "gzip-of-zeros": _writer(gzip.compress(bytes(64 << 20), 9)),
    "gzip-of-lines": _writer(gzip.compress(b"\n" * (2 << 20), 9)),
    "gzip-cut": _writer(gzip.compress(os.urandom(4096))[:-20]),
}
"""By name: a function that makes the file at a path."""


def _silent(peer: socket.socket, ended: threading.Event) -> None:
    ended.wait()


def _flood(first: bytes, repeated: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def answer(peer: socket.socket, ended: threading.Event) -> None:
        peer.recv(1 << 16)
        peer.sendall(first)
        while not ended.is_set():
            peer.sendall(repeated)

    return answer


def _drip(first: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def answer(peer: socket.socket, ended: threading.Event) -> None:
        peer.recv(1 << 16)
        peer.sendall(first)
        while not ended.wait(0.05):
            peer.sendall(b"1")

    return answer


def _repeat(reply: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def answer(peer: socket.socket, ended: threading.Event) -> None:
        while peer.recv(1 << 16):
            peer.sendall(reply)

    return answer


SERVERS: dict[str, Callable[[socket.socket, threading.Event], None]] = {
    "silent": _silent,
    "closing": lambda peer, ended: None,
    "flood": _flood(b"", b"1" * 65536),
    "flood-of-lines": _flood(b"", b"+a\r\n" * 16384),
    "flood-of-headers": _flood(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 8192),
    "flood-of-a-page": _flood(b"HTTP/1.1 200 OK\r\n\r\n", b"vllm:kvcache_tier_ a\n" * 4096),
    "flood-of-a-value": _flood(b"$9999999999\r\n", b"1" * 65536),
    "flood-of-lists": _flood(b"", b"*1\r\n" * 16384),
    "drip": _drip(b""),
    "drip-of-headers": _drip(b"HTTP/1.1 200 OK\r\na: "),
    "drip-of-a-page": _drip(b"HTTP/1.1 200 OK\r\n\r\n"),
    "drip-of-a-value": _drip(b"$1000000\r\n"),
    "garbage": _repeat(bytes(range(256))),
    "http": _repeat(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "secret": _repeat(b"-ERR \x1b[31mredis://me:hunter2@host password=hunter2\r\n"),
    "endless-list": _repeat(b"*2\r\n$1\r\n7\r\n*0\r\n"),
    "numbers": _repeat(
        b"HTTP/1.1 200 OK\r\nContent-Length: 92\r\n\r\n"
        b'vllm:kvcache_tier_usage_bytes{tier="\x1b[31m"} inf\n'
        + b'vllm:kvcache_tier_pinned{tier="\x1b[31m"} 1e999\n'.ljust(44)
    ),
}
"""By name: a function that serves one connection until the event is set."""


@contextmanager
def server(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[int]:
    """Serve each connection with `answer` on the loopback address; yield the port."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def serve(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            answer(peer, ended)

    def accept() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                peers.append(peer)
                thread = threading.Thread(target=serve, args=(peer,))
                thread.start()
                threads.append(thread)

    peers: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for peer in peers:
                with suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
