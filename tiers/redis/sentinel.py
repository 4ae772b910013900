"""The server that Sentinels name as the master, now and after each failover.

Invariants:

* The tier asks the Sentinels before the first call, and again after a failure, a ``READONLY`` or a
  connection that the server closed; one call at a time does so, at most once a second.
* redis-py chooses the master from the Sentinels' answers. The answers come over
  :class:`RespConnection`, so the deadline of the call and the limits of a reply apply.
* After a failover, no connection to the old master is used again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NoReturn, cast

import redis
from redis.sentinel import MasterNotFoundError, Sentinel

from kvcache.tiers.redis.connect import ConnectionRejectedError, Connector, error_from
from kvcache.tiers.redis.node import NO_ANSWER, REJECTED, Node, OutageLog, RefreshGate
from kvcache.tiers.redis.resp import ErrorReply, ProtocolError
from kvcache.tiers.redis.sockets import Address, half_deadline

log = logging.getLogger(__name__)

_MAX_SHOWN_MASTERS = 5  # in the error for a master that the Sentinels do not know


class SentinelMaster:
    """A group of one server: the master that Sentinels know by a name.

    Args:
        sentinels: their addresses; the first one that answers is asked first the next time.
        name: the name of the master.
        sentinel_connector: makes connections to Sentinels.
        connector: makes connections to the master.
        connections: the number of connections to the master at the same time.
    """

    def __init__(
        self,
        sentinels: Sequence[Address],
        name: str,
        sentinel_connector: Connector,
        connector: Connector,
        connections: int,
    ) -> None:
        self._sentinels = list(sentinels)
        self._name = name
        self._sentinel_connector = sentinel_connector
        self._connector = connector
        self._connections = connections
        self._node: Node | None = None
        self._outdated = True  # whether another server may be the master now
        self._closed = False
        self._lock = threading.Lock()  # guards the three above
        self._refresh_gate = RefreshGate()
        self._outage = OutageLog()
        self._unknown = ErrorReply(NO_ANSWER, "no Sentinel has answered yet")

    def nodes_for(self, names: Sequence[bytes], deadline: float) -> list[Node | ErrorReply]:
        node = self._node
        if self._outdated or node is None or node.failing or node.closed_while_idle:
            self._refresh(deadline)
        return [self._node or self._unknown] * len(names)

    def observe_error(self, error: ErrorReply) -> None:
        if error.code in {"READONLY", "MASTERDOWN", NO_ANSWER, REJECTED}:
            self._outdated = True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._node is not None:
                self._node.close()

    def find_master(self, deadline: float) -> Address:
        """Return the address of the master.

        Raises:
            ConnectionRejectedError: the Sentinels reject the connection, or do not know the master.
            ConnectionError: no Sentinel can be reached, or the master is down.
        """
        queries = [
            _SentinelQuery(address, self._sentinel_connector, deadline)
            for address in self._sentinels
        ]
        chooser = Sentinel([])
        chooser.sentinels = list(queries)
        try:
            host, port = chooser.discover_master(self._name)
        except MasterNotFoundError:
            self._raise_not_found(queries)
        self._sentinels = [each.address for each in chooser.sentinels]
        return Address(host, port)

    def _raise_not_found(self, queries: Sequence[_SentinelQuery]) -> NoReturn:
        """Raise an error with the cause, which redis-py's own error lacks."""
        answered = [each for each in queries if not each.error]
        final = all(each.rejected or not each.error for each in queries)
        kind = ConnectionRejectedError if final else ConnectionError
        if any(self._name in each.masters for each in answered):
            raise ConnectionError(f"Sentinel reports that the master {self._name} is down")
        if answered:
            known = sorted({name for each in answered for name in each.masters})[
                :_MAX_SHOWN_MASTERS
            ]
            raise kind(
                f"redis sentinel at {answered[0].address} does not watch a master "
                f"{self._name}; it watches {', '.join(known) or 'none'}"
            )
        causes = [f"redis sentinel at {each.address}: {each.error}" for each in queries]
        raise kind("; ".join(causes))

    def _refresh(self, deadline: float) -> None:
        """Ask the Sentinels, unless another call does so or did a moment ago."""
        with self._refresh_gate.enter() as may_refresh:
            if not may_refresh:
                return
            try:
                address = self.find_master(deadline)
            except (ConnectionRejectedError, OSError) as error:
                code = REJECTED if isinstance(error, ConnectionRejectedError) else NO_ANSWER
                self._unknown = ErrorReply(code, str(error))
                self._outage.begin(self._unknown)
                return
            self._outage.end()
            with self._lock:
                self._outdated = False
                previous = self._node
                if previous is not None and previous.address == address:
                    previous.closed_while_idle = False
                    return
                if self._closed:
                    return
                self._node = Node(address, self._connector, self._connections)
        if previous is not None:
            log.warning(
                "kvcache: redis: master %s moved from %s to %s (Sentinel); calls follow it",
                self._name,
                previous.address,
                address,
            )
            previous.close()


class _SentinelQuery:
    """A query to one Sentinel, with the method that redis-py calls."""

    def __init__(self, address: Address, connector: Connector, deadline: float) -> None:
        self.address = address
        self._connector = connector
        self._deadline = deadline
        self.masters: dict[str, dict[str, object]] = {}
        self.error = "it was not asked"
        self.rejected = False

    def sentinel_masters(self) -> dict[str, dict[str, object]]:
        """Return the masters that the Sentinel watches, by name, with the fields redis-py reads.

        Raises:
            redis.ConnectionError: the Sentinel did not answer, for any reason.
        """
        try:
            # Half of the remaining time: if this Sentinel hangs, another one can be asked.
            self.masters = self._ask(half_deadline(self._deadline))
        except (ConnectionRejectedError, OSError, ProtocolError) as error:
            self.rejected = isinstance(error, ConnectionRejectedError)
            self.error = str(error) or type(error).__name__
            raise redis.ConnectionError(self.error) from None
        self.error = ""
        return self.masters

    def _ask(self, deadline: float) -> dict[str, dict[str, object]]:
        with closing(self._connector.connect(self.address, deadline)) as connection:
            reply = connection.call(b"SENTINEL", b"MASTERS", deadline=deadline)
            if isinstance(reply, ErrorReply):
                raise error_from(reply)
            masters: dict[str, dict[str, object]] = {}
            try:
                for items in cast(Any, reply):
                    fields = dict(zip(items[::2], items[1::2], strict=True))
                    address = connection.parse_address(fields[b"ip"], int(fields[b"port"]))
                    flags = fields[b"flags"].split(b",")
                    masters[connection.printable(fields[b"name"])] = {
                        "ip": address.host,
                        "port": address.port,
                        "is_master": b"master" in flags,
                        "is_sdown": b"s_down" in flags,
                        "is_odown": b"o_down" in flags,
                        "num-other-sentinels": int(fields[b"num-other-sentinels"]),
                    }
            except (TypeError, ValueError, KeyError, AttributeError):
                raise ProtocolError("its answer to SENTINEL MASTERS is invalid") from None
            return masters
