"""Servers: one, or those of a cluster, and which of them has a key.

Always true here:

* A connection is used by one call at a time and put back only when every reply to it was read;
  after anything else it is closed, and so are the idle ones beside it.
* An idle connection that has something to say (a farewell, most often) is closed, not used.
* ``ask`` answers every command and raises nothing that a server or the way to it can do.
* Of a cluster, nobody waits for a node that failed within the last second, and the map of slots is
  asked for again, by one call at a time, while anything says that it is old.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from kvcache.tiers.redis.login import Address, Login, LoginError
from kvcache.tiers.redis.wire import Command, Refused, Reply, Wire, WireError, left

log = logging.getLogger(__name__)

NO_ANSWER = "NOANSWER"
"""The code of what was not answered: the connection failed, or there was no node to ask."""

LOGIN = "LOGIN"
"""The code of what was not asked, since the server would not have us."""

_PAUSE_S = 1.0


class Node:
    """One server, and connections to it.

    Args:
        address: where it is.
        login: how a connection is made.
        connections: to it at once; a call that needs one more waits.
    """

    def __init__(self, address: Address, login: Login, connections: int) -> None:
        self.address = address
        self._login = login
        self._room = threading.BoundedSemaphore(connections)
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._closed = False
        self._failed_at: float | None = None

    def ask(self, commands: Sequence[Command], deadline: float) -> list[Reply]:
        """The replies to ``commands``, each a :class:`Refused` where there was none."""
        replies: list[Reply] = []
        code = NO_ANSWER
        try:
            with self._connection(deadline) as wire:
                for reply in wire.exchange(commands, deadline):
                    replies.append(reply)  # noqa: PERF402 - those before a failure count
        except LoginError as error:
            code, why = LOGIN, str(error)
        except (OSError, WireError, redis.RedisError) as error:
            why = str(error) or type(error).__name__
        else:
            self._succeeded()
            if any(isinstance(reply, Refused) and reply.code == "READONLY" for reply in replies):
                self._drop_idle()  # its name may stand for another server by now
            return replies
        self._failed(why)
        unanswered = Refused(code, f"redis at {self.address}: {why}")
        return replies + [unanswered] * (len(commands) - len(replies))

    @property
    def failing(self) -> bool:
        """Whether its last call failed."""
        return self._failed_at is not None

    @property
    def resting(self) -> bool:
        """Whether it failed so short a while ago that another one had better be asked."""
        failed_at = self._failed_at
        return failed_at is not None and time.monotonic() - failed_at < _PAUSE_S

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it is put back."""
        self._closed = True
        self._drop_idle()

    @contextmanager
    def _connection(self, deadline: float) -> Iterator[Wire]:
        if not self._room.acquire(timeout=left(deadline)):
            raise TimeoutError("all connections were in use")
        try:
            wire = self._idle_one() or Wire(self._login.connect(self.address, left(deadline)))
            try:
                yield wire
            except BaseException:
                wire.close()
                raise
            with self._lock:
                self._idle.append(wire)
            if self._closed:
                self._drop_idle()
        finally:
            self._room.release()

    def _idle_one(self) -> Wire | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                wire = self._idle.pop()
            if wire.quiet():
                return wire
            wire.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _failed(self, why: str) -> None:
        self._drop_idle()
        if self._failed_at is None:
            log.warning(
                "kvcache: redis at %s does not answer, and what it holds is missed until it does "
                "(%s)", self.address, why,
            )  # fmt: skip
        self._failed_at = time.monotonic()

    def _succeeded(self) -> None:
        if self._failed_at is not None:
            log.warning("kvcache: redis at %s answers again", self.address)
            self._failed_at = None


class Servers(Protocol):
    """Who is asked for which key."""

    def nodes_of(self, names: Sequence[bytes], deadline: float) -> list[Node | Refused]:
        """For each name its node, or why there is none."""

    def heard(self, refused: Refused) -> None:
        """A node answered with this."""

    def close(self) -> None:
        """Close every connection."""


class OneServer:
    """All keys are at one server."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def nodes_of(self, names: Sequence[bytes], deadline: float) -> list[Node | Refused]:
        return [self._node] * len(names)

    def heard(self, refused: Refused) -> None:
        pass

    def close(self) -> None:
        self._node.close()


class Cluster:
    """Each key is at the node that has its slot.

    Args:
        seed: a node, any of them.
        login: how a connection is made.
        connections: to each node at once.
    """

    def __init__(self, seed: Address, login: Login, connections: int) -> None:
        self._seed = seed
        self._login = login
        self._connections = connections
        self._nodes: dict[Address, Node] = {}
        self._slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._old = True  # what is known of slots
        self._lock = threading.Lock()  # of the three above
        self._looked_at = float("-inf")
        self._looking = threading.Lock()  # held while a node is asked
        self._unknown = Refused(NO_ANSWER, "")

    def nodes_of(self, names: Sequence[bytes], deadline: float) -> list[Node | Refused]:
        if self._old or any(node.failing for node in self._nodes.values()):
            self._look(deadline)
        return [self._asked(self._slots[key_slot(name)]) for name in names]

    def _asked(self, node: Node | None) -> Node | Refused:
        if node is None:
            return self._unknown
        if node.resting:
            return Refused(NO_ANSWER, f"redis at {node.address} failed a moment ago")
        return node

    def heard(self, refused: Refused) -> None:
        if refused.code in {"MOVED", "CLUSTERDOWN", "READONLY", NO_ANSWER}:
            self._old = True
        if refused.code != "MOVED":
            return
        _, slot, place = (*refused.text.split(" ", 2), "", "")[:3]
        host, _, port = place.rpartition(":")
        if host and port.isdigit() and slot.isdigit() and int(slot) < len(self._slots):
            with self._lock:
                self._slots[int(slot)] = self._node(Address(host, int(port)))

    def close(self) -> None:
        with self._lock:
            for node in self._nodes.values():
                node.close()

    def _node(self, address: Address) -> Node:
        if address not in self._nodes:
            nodes = dict(self._nodes)  # others go through it meanwhile
            nodes[address] = Node(address, self._login, self._connections)
            self._nodes = nodes
        return self._nodes[address]

    def _look(self, deadline: float) -> None:
        """Ask for the map of slots, unless somebody does so or did a moment ago."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            if time.monotonic() - self._looked_at < _PAUSE_S:
                return
            self._looked_at = time.monotonic()
            nodes = sorted(self._nodes.values(), key=lambda node: node.failing)
            for address in dict.fromkeys([*(node.address for node in nodes), self._seed]):
                try:
                    # Half of what is left: a node that hangs leaves time to ask another.
                    self._learn(_slots_of(self._login, address, left(deadline) / 2))
                except (OSError, LoginError, redis.RedisError, WireError) as error:
                    code = LOGIN if isinstance(error, LoginError) else NO_ANSWER
                    self._unknown = Refused(code, f"redis cluster at {address}: {error}")
                    log.debug("kvcache: %s", self._unknown.text)
                else:
                    break
        finally:
            self._looking.release()

    def _learn(self, ranges: Sequence[tuple[int, int, Address]]) -> None:
        now = {address for _, _, address in ranges}
        with self._lock:
            slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
            for first, last, address in ranges:
                slots[first : last + 1] = [self._node(address)] * (last + 1 - first)
            gone = [node for address, node in self._nodes.items() if address not in now]
            self._nodes = {address: self._nodes[address] for address in now}
            self._slots = slots
            self._old = False
            self._unknown = Refused(NO_ANSWER, "no node of the redis cluster has the slot")
        for node in gone:
            node.close()


def _slots_of(login: Login, address: Address, timeout_s: float) -> list[tuple[int, int, Address]]:
    """What a node says of the cluster: ranges of slots, and the primary of each."""
    connection = login.connect(address, timeout_s)
    try:
        connection.send_command("CLUSTER", "SLOTS")
        said: Any = connection.read_response()
    except redis.ResponseError as error:
        raise LoginError(str(error)) from None
    finally:
        connection.disconnect()
    try:
        ranges = [
            (int(first), int(last), Address(_host(primary[0], address), int(primary[1])))
            for first, last, primary, *_ in said
        ]
    except (TypeError, ValueError, IndexError):
        raise WireError("it does not say which node has which slots") from None
    if any(not 0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS for first, last, _ in ranges):
        raise WireError("it names slots that there cannot be")
    return ranges


def _host(said: bytes | None, asked: Address) -> str:
    """A node that does not know its own name is where it was asked."""
    return said.decode() if said and said != b"?" else asked.host
