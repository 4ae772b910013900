"""A Redis cluster: its nodes, and the map of slots to nodes.

Invariants:

* No call waits for a node that failed within the last second.
* While a node fails, or after an error that shows an outdated map, one call at a time fetches the
  map of slots again.
* An address that a server returns is checked before it is used, and the number of nodes is bounded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any, cast

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from kvcache.tiers.redis.connect import ConnectionRejectedError, Connector, error_from
from kvcache.tiers.redis.node import NO_ANSWER, REJECTED, Node, OutageLog, RefreshGate
from kvcache.tiers.redis.resp import ErrorReply, ProtocolError, parse_address
from kvcache.tiers.redis.sockets import Address, half_deadline

log = logging.getLogger(__name__)

MAX_NODES = 1024
"""The most nodes that MOVED may name between two maps of slots; a cluster has at most 1000."""

SlotRange = tuple[int, int, Address]
"""The first slot, the last slot, and the primary that has them."""


class Cluster:
    """A group of servers; each has a part of the slots.

    Args:
        seed: the address of any node.
        connector: makes connections.
        connections: the number of connections to each node at the same time.

    Attributes:
        nodes: the known nodes; never changed in place, so that it can be read without the lock.
        slots: the node of each slot.
    """

    def __init__(self, seed: Address, connector: Connector, connections: int) -> None:
        self._seed = seed
        self._connector = connector
        self._connections = connections
        self.nodes: dict[Address, Node] = {}
        self.slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._map_outdated = True
        self._lock = threading.Lock()  # guards the three above
        self._refresh_gate = RefreshGate()
        self._last_refresh_failed = False
        self._unknown = ErrorReply(NO_ANSWER, "")  # the reply for slots without a node
        self._outage = OutageLog()

    def nodes_for(self, names: Sequence[bytes], deadline: float) -> list[Node | ErrorReply]:
        if self._map_outdated or any(node.failing for node in self.nodes.values()):
            self._refresh(deadline)
        return [self._usable(self.slots[key_slot(name)]) for name in names]

    def _usable(self, node: Node | None) -> Node | ErrorReply:
        if node is None:
            return self._unknown
        if node.failed_recently:
            return ErrorReply(NO_ANSWER, f"redis at {node.address} failed a moment ago")
        return node

    def observe_error(self, error: ErrorReply) -> None:
        if error.code in {"MOVED", "CLUSTERDOWN", "READONLY", NO_ANSWER}:
            self._map_outdated = True
        if error.code != "MOVED":
            return
        _, slot_text, target = (*error.text.split(" ", 2), "", "")[:3]
        host, _, port = target.rpartition(":")
        with suppress(ValueError, IndexError, ProtocolError):
            slot, address = int(slot_text), parse_address(host, int(port))
            with self._lock:
                if slot >= 0 and (address in self.nodes or len(self.nodes) < MAX_NODES):
                    self.slots[slot] = self._node_at(address)

    def close(self) -> None:
        with self._lock:
            for node in self.nodes.values():
                node.close()

    def _node_at(self, address: Address) -> Node:
        if address not in self.nodes:
            node = Node(address, self._connector, self._connections)
            self.nodes = {**self.nodes, address: node}
        return self.nodes[address]

    def _refresh(self, deadline: float) -> None:
        """Fetch the map of slots, unless another call does so or did a moment ago."""
        with self._refresh_gate.enter() as may_refresh:
            if not may_refresh:
                return
            nodes = sorted(self.nodes.values(), key=lambda node: node.failing)
            addresses = [*(node.address for node in nodes), self._seed]
            if self._last_refresh_failed:  # if all nodes hang, the last address gets no time
                addresses = [self._seed, *addresses]
            self._last_refresh_failed = True
            for address in dict.fromkeys(addresses):
                try:
                    # Half of the remaining time: leaves time for another node if this one hangs.
                    ranges = fetch_slot_ranges(self._connector, address, half_deadline(deadline))
                    self._replace_map(ranges)
                except (OSError, ConnectionRejectedError, ProtocolError) as error:
                    rejected = isinstance(error, ConnectionRejectedError)
                    code = REJECTED if rejected else NO_ANSWER
                    self._unknown = ErrorReply(code, f"redis cluster at {address}: {error}")
                    log.debug(
                        "kvcache: redis cluster at %s: slots not fetched (%s)", address, error
                    )
                else:
                    self._last_refresh_failed = False
                    self._outage.end()
                    break
            else:
                self._outage.begin(self._unknown)

    def _replace_map(self, ranges: Sequence[SlotRange]) -> None:
        addresses = {address for _, _, address in ranges}
        with self._lock:
            slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
            for first, last, address in ranges:
                slots[first : last + 1] = [self._node_at(address)] * (last + 1 - first)
            removed = [node for address, node in self.nodes.items() if address not in addresses]
            self.nodes = {address: self.nodes[address] for address in addresses}
            self.slots = slots
            self._map_outdated = False
            self._unknown = ErrorReply(NO_ANSWER, "no node of the redis cluster has the slot")
        for node in removed:
            node.close()


def fetch_slot_ranges(connector: Connector, address: Address, deadline: float) -> list[SlotRange]:
    """Ask a node which primary has which slots.

    Raises:
        ConnectionRejectedError, OSError: the node cannot be asked.
        ProtocolError: its answer is invalid.
    """
    with closing(connector.connect(address, deadline)) as connection:
        reply = connection.call(b"CLUSTER", b"SLOTS", deadline=deadline)
        if isinstance(reply, ErrorReply):
            raise error_from(reply)
        ranges = []
        try:
            for first, last, primary, *_ in cast(Any, reply):
                host, port = primary[0], int(primary[1])
                if not host or host == b"?":  # the node does not know its own name
                    host = address.host.encode()
                ranges.append((int(first), int(last), connection.parse_address(host, port)))
        except (TypeError, ValueError, IndexError, AttributeError):
            raise ProtocolError("its answer to CLUSTER SLOTS is invalid") from None
    slots = sum(last + 1 - first for first, last, _ in ranges)
    if slots > REDIS_CLUSTER_HASH_SLOTS or any(
        not 0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS for first, last, _ in ranges
    ):
        raise ProtocolError("its answer to CLUSTER SLOTS has invalid slots")
    return ranges
