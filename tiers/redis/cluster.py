"""Servers: one, or those of a cluster, and which of them has a key.

Always true here:

* A connection is used by one call at a time and put back only when every reply to it was read;
  after anything else it is closed, and so are the idle ones beside it.
* An idle connection that has something to say (a farewell, most often) is closed, not used.
* ``ask`` answers every command and raises nothing that a server or the way to it can do.
* Of a cluster, nobody waits for a node that failed within the last second, and the map of slots is
  asked for again, by one call at a time, while anything says that it is old.
* What a server says of other servers is an address, or is not used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, Protocol, cast

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from kvcache.tiers.redis.connect import Login, LoginError, error_of
from kvcache.tiers.redis.resp import Command, Refused, Reply, Wire, WireError, address_of
from kvcache.tiers.redis.sockets import Address, halfway, left

log = logging.getLogger(__name__)

NO_ANSWER = "NOANSWER"
"""The code of what was not answered: the connection failed, or there was no node to ask."""

LOGIN = "LOGIN"
"""The code of what was not asked, since the server would not have us."""

_PAUSE_S = 1.0
_MOST_NODES = 1024  # that MOVED may name between two maps of slots; Redis has 1000 at most


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
        self.hung_up = False  # whether the server closed a connection while it was idle

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
        except (OSError, WireError) as error:
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
            wire = self._idle_one() or self._login.connect(self.address, deadline)
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
            self.hung_up = True
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


class OncePerSecond:
    """Whose turn it is to ask what a failure makes every call want to know.

    One thread has it at a time, and once a second.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken_at = float("-inf")

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Whether it is the caller's, until the end of the block. Waits for nothing."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            due = time.monotonic() - self._taken_at >= _PAUSE_S
            if due:
                self._taken_at = time.monotonic()
            yield due
        finally:
            self._lock.release()


class Outage:
    """A time without a server to ask. Logs it once; what refuses us for good is an error at start,
    and is logged where a call fails for it."""

    def __init__(self) -> None:
        self._lasts = False

    def began(self, why: Refused) -> None:
        """No server to ask was found, as ``why`` says."""
        if not self._lasts and why.code == NO_ANSWER:
            log.warning(
                "kvcache: redis: no server is known (%s); its blocks count as misses until one "
                "is", why.text,
            )  # fmt: skip
            self._lasts = True

    def ended(self) -> None:
        """A server was found."""
        if self._lasts:
            log.warning("kvcache: redis: a server is known again")
            self._lasts = False


class ServerGroup(Protocol):
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
        self._turn = OncePerSecond()
        self._lost = False  # nobody answered when the map was asked for last
        self._unknown = Refused(NO_ANSWER, "")
        self._outage = Outage()

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
        with suppress(ValueError, IndexError, WireError):
            at, address = int(slot), address_of(host, int(port))
            with self._lock:
                if at >= 0 and (address in self._nodes or len(self._nodes) < _MOST_NODES):
                    self._slots[at] = self._node(address)

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
        with self._turn.taken() as mine:
            if not mine:
                return
            nodes = sorted(self._nodes.values(), key=lambda node: node.failing)
            order = [*(node.address for node in nodes), self._seed]
            if self._lost:  # nodes that hang leave no time for the seed, behind any number of them
                order = [self._seed, *order]
            self._lost = True
            for address in dict.fromkeys(order):
                try:
                    # Half of what is left: a node that hangs leaves time to ask another.
                    self._learn(slots_of(self._login, address, halfway(deadline)))
                except (OSError, LoginError, WireError) as error:
                    code = LOGIN if isinstance(error, LoginError) else NO_ANSWER
                    self._unknown = Refused(code, f"redis cluster at {address}: {error}")
                    log.debug("kvcache: %s", self._unknown.text)
                else:
                    self._lost = False
                    self._outage.ended()
                    break
            else:
                self._outage.began(self._unknown)

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


def slots_of(login: Login, address: Address, deadline: float) -> list[tuple[int, int, Address]]:
    """What a node says of the cluster: ranges of slots, and the primary of each.

    Raises:
        LoginError, OSError, WireError: it does not say, or what it says cannot be.
    """
    with closing(login.connect(address, deadline)) as wire:
        said = wire.say(b"CLUSTER", b"SLOTS", deadline=deadline)
        if isinstance(said, Refused):
            raise error_of(said)
        ranges = []
        try:
            for first, last, primary, *_ in cast(Any, said):
                host, port = primary[0], int(primary[1])
                # A node that does not know its own name is where it was asked.
                here = not host or host == b"?"
                its = wire.address(address.host.encode() if here else host, port)
                ranges.append((int(first), int(last), its))
        except (TypeError, ValueError, IndexError, AttributeError):
            raise WireError("it does not say which node has which slots") from None
    slots = sum(last + 1 - first for first, last, _ in ranges)
    if slots > REDIS_CLUSTER_HASH_SLOTS or any(
        not 0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS for first, last, _ in ranges
    ):
        raise WireError("it names slots that there cannot be")
    return ranges
