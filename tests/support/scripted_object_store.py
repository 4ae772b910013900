"""An object store on loopback, which injects faults.

It speaks as much of the protocols of S3, Google Cloud Storage and Azure as a tier uses.
"""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from kvcache.closeable import Closeable

BUCKET = "bucket"

Fault = Callable[["Exchange"], bool]
"""Sees a request before the store does; returns whether it has answered it."""


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer.

    Attributes:
        name: the name of the object.
        body: the body of the request.
        store: the store.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: ScriptedObjectStore
    name = ""
    body = b""

    def answer(self, status: int, body: bytes = b"", nbytes: int | None = None) -> None:
        """Send an answer; it announces ``nbytes`` instead of the bytes of ``body``."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if nbytes is None else nbytes))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 12:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_batch(self, statuses: list[int]) -> None:
        """Send the answer to Azure's batch of requests."""
        parts = "".join(
            f"--batch\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
            f"HTTP/1.1 {status} Text\r\nContent-Length: 0\r\n\r\n\r\n"
            for number, status in enumerate(statuses)
        )
        body = f"{parts}--batch--\r\n".encode()
        self.send_response(202)
        self.send_header("Content-Type", "multipart/mixed; boundary=batch")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_error(self, status: int, code: str, message: str = "") -> None:
        """Send an error of S3."""
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self.answer(status, text.encode())

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(OSError):
            super().handle_one_request()
            return
        self.close_connection = True

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        self.name = unquote(path.removeprefix(f"/{BUCKET}").removeprefix("/"))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.store.serve(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - names of the base class


class ScriptedObjectStore(Closeable):
    """Keeps objects in a dict.

    Args:
        tls: the context of an https:// store; ``None`` speaks http://.

    Attributes:
        objects: the objects, by name.
        fault: may be set; it sees every request first.
        requests: method and name of every request.
        paths: the path of every request, with its parameters.
        headers: the headers of every request.
        most_at_once: the most requests that were in progress at the same time.
        closing: set when the store is being closed.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.closing = threading.Event()
        self._in_progress = 0
        self._lock = threading.Lock()
        handler = type("BoundExchange", (Exchange,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._tls = tls is not None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def options(self, **options: Any) -> dict[str, Any]:
        """Return options of a tier on this store; the variables of `set_login` must be set."""
        return {
            "url": f"s3://{BUCKET}",
            "endpoint": self.endpoint,
            "access_key_env": "KV_SCRIPTED_ACCESS_KEY",
            "secret_key_env": "KV_SCRIPTED_SECRET_KEY",
            **options,
        }

    def serve(self, exchange: Exchange) -> None:
        """Answer one request."""
        with self._lock:
            self.requests.append((exchange.command, exchange.name))
            self.paths.append(exchange.path)
            self.headers.append({name.lower(): value for name, value in exchange.headers.items()})
            self._in_progress += 1
            self.most_at_once = max(self.most_at_once, self._in_progress)
        answered = False
        try:
            answered = self.fault is not None and self.fault(exchange)
        finally:
            with self._lock:  # before the answer, after which the client may send a request
                self._in_progress -= 1
        if not answered:
            self._answer(exchange)

    def _answer(self, exchange: Exchange) -> None:
        name = exchange.name
        if exchange.command == "PUT":
            is_azure = "x-ms-blob-type" in exchange.headers
            conditions = ("If-None-Match", "*"), ("x-goog-if-generation-match", "0")
            create = any(exchange.headers.get(header) == value for header, value in conditions)
            if create and name in self.objects and is_azure:
                exchange.answer_error(409, "BlobAlreadyExists")
            elif create and name in self.objects:
                exchange.answer_error(412, "PreconditionFailed")
            else:
                self.objects[name] = exchange.body
                exchange.answer(201 if is_azure else 200)
        elif exchange.command == "POST":
            deleted = re.findall(
                rf"^DELETE /{BUCKET}/([^\s?]+)", exchange.body.decode(), re.MULTILINE
            )
            found = [self.objects.pop(unquote(each), None) for each in deleted]
            exchange.answer_batch([404 if value is None else 202 for value in found])
        elif exchange.command == "DELETE":
            self.objects.pop(name, None)
            exchange.answer(204)
        elif name in self.objects:
            exchange.answer(200, self.objects[name])
        else:
            exchange.answer_error(404, "NoSuchKey", "The specified key does not exist.")

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def only(method: str, fault: Fault) -> Fault:
    """Return ``fault`` for the requests of one method."""
    return lambda exchange: exchange.command == method and fault(exchange)


def silent(exchange: Exchange) -> bool:
    """Answer nothing."""
    exchange.store.closing.wait()
    exchange.close_connection = True
    return True


def hang_up(exchange: Exchange) -> bool:
    """Close the connection without an answer."""
    exchange.close_connection = True
    return True


def dripping(exchange: Exchange) -> bool:
    """Announce a body, and send a byte of it from time to time."""
    exchange.answer(200, nbytes=1000)
    while not exchange.store.closing.wait(0.02):
        exchange.wfile.write(b"x")
        exchange.wfile.flush()
    exchange.close_connection = True
    return True


def cut_off(exchange: Exchange) -> bool:
    """Send half of the body, and close the connection."""
    value = exchange.store.objects[exchange.name]
    exchange.answer(200, value[: len(value) // 2], nbytes=len(value))
    exchange.close_connection = True
    return True


def rejecting(status: int, code: str = "", message: str = "") -> Fault:
    """Return a fault that answers every request with an error."""

    def reject(exchange: Exchange) -> bool:
        exchange.answer_error(status, code or f"Code{status}", message)
        return True

    return reject
