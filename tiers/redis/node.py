"""One server and its connections, and the parts that all kinds of server group share.

Invariants:

* One call at a time uses a connection. It is reused only if every reply to the call was read;
  otherwise it is closed, together with the idle ones.
* An idle connection on which the server has sent something (usually a last error) is closed.
* ``Node.execute`` returns a reply for every command. It raises nothing because of a server or the
  network.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from kvcache.tiers.redis.connect import ConnectionRejectedError, Connector
from kvcache.tiers.redis.resp import Command, ErrorReply, ProtocolError, Reply, RespConnection
from kvcache.tiers.redis.sockets import Address, remaining_s

log = logging.getLogger(__name__)

NO_ANSWER = "NOANSWER"
"""The code of a command without an answer: the connection failed, or no server is known."""

REJECTED = "LOGIN"
"""The code of a command that was not sent, because the server rejected the connection."""


class Node:
    """One server, and connections to it.

    Args:
        address: the server's address.
        connector: makes connections.
        connections: the number of connections at the same time; further calls wait for one.

    Attributes:
        retry_pause_s: how long a server counts as failed after a failure.
        closed_while_idle: whether the server closed an idle connection.
    """

    retry_pause_s: float = 1.0

    def __init__(self, address: Address, connector: Connector, connections: int) -> None:
        self.address = address
        self._connector = connector
        self._free_connections = threading.BoundedSemaphore(connections)
        self._lock = threading.Lock()
        self._idle: list[RespConnection] = []
        self._closed = False
        self._failed_at: float | None = None
        self.closed_while_idle = False

    def execute(self, commands: Sequence[Command], deadline: float) -> list[Reply]:
        """Send ``commands``; return their replies, an :class:`ErrorReply` for each failed one."""
        replies: list[Reply] = []
        code = NO_ANSWER
        try:
            with self._connection(deadline) as connection:
                for reply in connection.exchange(commands, deadline):
                    replies.append(reply)  # noqa: PERF402 - keeps those before a failure
        except ConnectionRejectedError as error:
            code, cause = REJECTED, str(error)
        except (OSError, ProtocolError) as error:
            cause = str(error) or type(error).__name__
        else:
            self._record_success()
            if any(isinstance(reply, ErrorReply) and reply.code == "READONLY" for reply in replies):
                self._close_idle()  # after a failover its name may lead to another server
            return replies
        self._record_failure(cause)
        unanswered = ErrorReply(code, f"redis at {self.address}: {cause}")
        return replies + [unanswered] * (len(commands) - len(replies))

    @property
    def failing(self) -> bool:
        """Whether the last call failed."""
        return self._failed_at is not None

    @property
    def failed_recently(self) -> bool:
        """Whether the last call failed, within the last ``retry_pause_s`` seconds."""
        failed_at = self._failed_at
        return failed_at is not None and time.monotonic() - failed_at < self.retry_pause_s

    def close(self) -> None:
        """Close the idle connections now, and the others when their calls end."""
        self._closed = True
        self._close_idle()

    @contextmanager
    def _connection(self, deadline: float) -> Iterator[RespConnection]:
        if not self._free_connections.acquire(timeout=remaining_s(deadline)):
            raise TimeoutError("all connections were in use")
        try:
            connection = self._take_idle() or self._connector.connect(self.address, deadline)
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            with self._lock:
                self._idle.append(connection)
            if self._closed:
                self._close_idle()
        finally:
            self._free_connections.release()

    def _take_idle(self) -> RespConnection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_idle():
                return connection
            self.closed_while_idle = True
            connection.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _record_failure(self, cause: str) -> None:
        self._close_idle()
        if self._failed_at is None:
            log.warning(
                "kvcache: redis at %s: unreachable (%s); its blocks count as misses until it "
                "recovers", self.address, cause,
            )  # fmt: skip
        self._failed_at = time.monotonic()

    def _record_success(self) -> None:
        if self._failed_at is not None:
            log.warning("kvcache: redis at %s: reachable again", self.address)
            self._failed_at = None


class RefreshGate:
    """Lets one call at a time refresh the list of servers, once per ``interval_s``."""

    interval_s: float = 1.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_refresh = float("-inf")

    @contextmanager
    def enter(self) -> Iterator[bool]:
        """Yield whether the caller may refresh; wait for nothing."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            due = time.monotonic() - self._last_refresh >= self.interval_s
            if due:
                self._last_refresh = time.monotonic()
            yield due
        finally:
            self._lock.release()


class OutageLog:
    """Logs the beginning and the end of each time without a known server.

    A rejected connection is not logged here: it is an error at start, and in the call that fails.
    """

    def __init__(self) -> None:
        self._ongoing = False

    def begin(self, error: ErrorReply) -> None:
        """Record that no server was found, because of ``error``."""
        if not self._ongoing and error.code == NO_ANSWER:
            log.warning(
                "kvcache: redis: no server found (%s); blocks count as misses until one is found",
                error.text,
            )  # fmt: skip
            self._ongoing = True

    def end(self) -> None:
        """Record that a server was found."""
        if self._ongoing:
            log.warning("kvcache: redis: server found again")
            self._ongoing = False


class ServerGroup(Protocol):
    """The servers of a tier: it maps each key to a server."""

    def nodes_for(self, names: Sequence[bytes], deadline: float) -> list[Node | ErrorReply]:
        """Return the server of each name, or the reason why none is known."""

    def observe_error(self, error: ErrorReply) -> None:
        """Record that a server returned ``error``, which may say that the keys moved."""

    def close(self) -> None:
        """Close every connection."""


class SingleServer:
    """A group of one server, which has all keys."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def nodes_for(self, names: Sequence[bytes], deadline: float) -> list[Node | ErrorReply]:
        return [self._node] * len(names)

    def observe_error(self, error: ErrorReply) -> None:
        pass

    def close(self) -> None:
        self._node.close()
