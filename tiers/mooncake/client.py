"""A client of Mooncake's library: the gate in front of its methods, and the thread that opens it.

Invariants:

* No method of the library is called after its ``close``, which would crash the process. ``close``
  runs once, when no call is inside.
* The library holds the GIL while it opens and closes a client, so nothing in the process would run
  while it waits for a server. A client is therefore opened only after a process answered at the
  server's address a moment ago.
* A tier without a server starts. It is opened later, once the server is there.
"""

from __future__ import annotations

import atexit
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final
from weakref import WeakSet

from kvcache.process import ForkedError, bind_to_process
from kvcache.secrets import redact

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
"""From a failed attempt to open a client to the next one."""

EXIT_S: Final = 5.0
"""How long an exiting process waits for calls inside the library, which would abort it."""

_PROBE = bytes(64)
"""No request of any protocol: a process that reads it answers with an error or hangs up."""


class PoolClient:
    """One client of the library. Safe to call from several threads.

    Args:
        library_client: an open client of the library.
    """

    def __init__(self, library_client: Any) -> None:
        self._client = library_client
        self._lock = threading.Lock()
        self._inside = 0  # calls that have not returned
        self._closing = False
        self._closed = threading.Event()
        bind_to_process(self)  # any call in a forked child, also ``close``, would hang or crash
        _clients.add(self)

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the library.

        Raises:
            ConnectionError: the client was closed.
        """
        with self._lock:
            if self._closing:
                raise ConnectionError("the tier is closed")
            self._inside += 1
        try:
            return getattr(self._client, method)(*arguments)
        finally:
            with self._lock:
                self._inside -= 1
                is_last = self._closing and not self._inside
            if is_last:
                self._close()

    def close(self) -> None:
        """Allow no further call; close the client now, or when the last call inside returns."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            is_last = not self._inside
        if is_last:
            self._close()

    def wait_closed(self, timeout_s: float | None = None) -> None:
        """Wait until the library has closed the client."""
        self._closed.wait(timeout_s)

    def _close(self) -> None:
        try:
            self._client.close()
        finally:
            self._closed.set()


_clients: WeakSet[PoolClient] = WeakSet()


def close_at_exit(timeout_s: float = EXIT_S) -> None:
    """Close all clients before the process exits, and wait for the calls inside.

    The library aborts a process that exits during a call.
    """
    clients, until = list(_clients), time.monotonic() + timeout_s
    for client in clients:
        client.close()
    for client in clients:
        with suppress(ForkedError):  # this process is a child, and none of the calls is its own
            client.wait_closed(max(0.0, until - time.monotonic()))


atexit.register(close_at_exit)


class ClientOpener:
    """Opens a client in a thread, as soon as its server answers.

    Args:
        addresses: host and port of each server that must answer first; the first names the pool.
        open_client: opens a client of the library. Any exception is a failure.
        timeout_s: how long to wait for the server's answer.
        retry_s: from a failed attempt to the next one.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        open_client: Callable[[], PoolClient],
        timeout_s: float,
        retry_s: float = RETRY_S,
    ) -> None:
        self._addresses = list(addresses)
        self._name = f"{addresses[0][0]}:{addresses[0][1]}"
        self._open_client = open_client
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._client: PoolClient | None = None
        self._cause = "not asked yet"  # of the last failure to open it
        self._failing = False
        self._closing = threading.Event()
        self._attempted = threading.Event()
        self._start_thread()

    def wait_first_attempt(self, timeout_s: float) -> None:
        """Wait until a client is open or the first attempt failed; at most ``timeout_s``."""
        self._attempted.wait(timeout_s)

    def client(self) -> PoolClient:
        """Return the open client. After a call without an answer, check that the server answers.

        The library would try to connect for seconds.

        Raises:
            ConnectionError: none is open, or the server does not answer within the timeout.
        """
        client = self._client
        if client is None:
            raise ConnectionError(f"mooncake at {self._name} is not open: {self._cause}")
        if self._failing:
            try:
                self._probe_servers()
            except OSError as error:
                raise ConnectionError(f"mooncake at {self._name}: {error}") from error
        return client

    def replace(self, client: PoolClient) -> None:
        """Close ``client``, and open another one. Returns when the library has closed it."""
        with self._lock:
            is_current = self._client is client
            if is_current:
                self._client, self._cause = None, "a transfer did not end"
        client.close()
        client.wait_closed()
        if is_current and not self._closing.is_set():
            self._start_thread()

    def close(self) -> None:
        """Stop opening, and close the client if it is open. Waits for no call."""
        self._closing.set()
        with self._lock:
            client, self._client = self._client, None
            self._cause = "the tier is closed"
        if client is not None:
            client.close()

    def record_failure(self, cause: str) -> None:
        """Record that the server did not answer a call; the first of several is logged."""
        if not self._failing and not self._closing.is_set():
            self._failing = True
            log.warning(
                "kvcache: mooncake at %s: unreachable (%s); its blocks count as misses until it "
                "recovers", self._name, redact(cause),
            )  # fmt: skip

    def record_success(self) -> None:
        """Record that the server answered a call."""
        if self._failing:
            self._failing = False
            log.warning("kvcache: mooncake at %s: reachable again", self._name)

    def _probe_servers(self) -> None:
        for address in self._addresses:
            probe(address, self._timeout_s)

    def _start_thread(self) -> None:
        threading.Thread(target=self._open, name="kvcache-mooncake-open", daemon=True).start()

    def _open(self) -> None:
        while not self._closing.is_set():
            try:
                self._probe_servers()
                if self._closing.is_set():
                    return
                client = self._open_client()
            except Exception as error:  # noqa: BLE001 - the library may raise anything
                self._cause = str(error)
                self.record_failure(self._cause)
                self._attempted.set()
                self._closing.wait(self._retry_s)
                continue
            with self._lock:
                wanted = not self._closing.is_set()
                if wanted:
                    self._client = client
            if wanted:
                self.record_success()
            else:
                client.close()
            self._attempted.set()
            return


def probe(address: tuple[str, int], timeout_s: float) -> None:
    """Check that a process answers at ``address``: any answer will do, also a closed connection.

    A connection alone proves nothing, because the system accepts it for a process that hangs.

    Raises:
        OSError: it does not answer within about ``timeout_s``.
    """
    with socket.create_connection(address, timeout_s) as connection:
        connection.sendall(_PROBE)
        with suppress(ConnectionError):  # it closed the connection
            connection.recv(1)


def local_address(address: tuple[str, int]) -> str:
    """Return this host's IP address on the way to ``address``.

    Raises:
        OSError: the name cannot be resolved, or there is no way.
    """
    family, _, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(target)  # sends nothing
        return str(sock.getsockname()[0])
