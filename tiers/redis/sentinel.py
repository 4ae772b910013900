"""The server that Sentinels name as the master, now and after each failover.

Always true here:

* Sentinels are asked before the first call, and again after a failure, a ``READONLY`` or a
  connection that the server closed: by one call at a time, and once a second at most.
* redis-py chooses the master from what the Sentinels say; what they say comes over a connection of
  our own, so that the deadline of the call and the limits of a reply hold for it.
* When another server is the master, no connection to the old one is used again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NoReturn, cast

import redis
from redis.sentinel import MasterNotFoundError, Sentinel

from kvcache.tiers.redis.cluster import LOGIN, NO_ANSWER, Node, OncePerSecond, Outage
from kvcache.tiers.redis.connect import Login, LoginError, error_of
from kvcache.tiers.redis.resp import Refused, WireError
from kvcache.tiers.redis.sockets import Address, halfway

log = logging.getLogger(__name__)

_SHOWN_MASTERS = 5  # in an error, of those that Sentinels do know


class Watched:
    """The master that Sentinels know by a name.

    Args:
        sentinels: where to ask; the first that answers is asked first the next time.
        name: of the master.
        asking: how a connection to a Sentinel is made.
        login: how a connection to the master is made.
        connections: to the master at once.
    """

    def __init__(
        self,
        sentinels: Sequence[Address],
        name: str,
        asking: Login,
        login: Login,
        connections: int,
    ) -> None:
        self._sentinels = list(sentinels)
        self._name = name
        self._asking = asking
        self._login = login
        self._connections = connections
        self._node: Node | None = None
        self._old = True  # what is known of the master
        self._closed = False
        self._lock = threading.Lock()  # of the three above
        self._turn = OncePerSecond()
        self._outage = Outage()
        self._unknown = Refused(NO_ANSWER, "no Sentinel has answered yet")

    def nodes_of(self, names: Sequence[bytes], deadline: float) -> list[Node | Refused]:
        node = self._node
        if self._old or node is None or node.failing or node.hung_up:
            self._look(deadline)
        return [self._node or self._unknown] * len(names)

    def heard(self, refused: Refused) -> None:
        if refused.code in {"READONLY", "MASTERDOWN", NO_ANSWER, LOGIN}:
            self._old = True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._node is not None:
                self._node.close()

    def find(self, deadline: float) -> Address:
        """Where the master is.

        Raises:
            LoginError: the Sentinels refuse us, or do not know the master.
            ConnectionError: none can be reached, or the master is down.
        """
        asked = [_Asked(address, self._asking, deadline) for address in self._sentinels]
        chooser = Sentinel([])
        chooser.sentinels = list(asked)
        try:
            host, port = chooser.discover_master(self._name)
        except MasterNotFoundError:  # says less than what was asked
            self._raise_not_found(asked)
        self._sentinels = [each.address for each in chooser.sentinels]
        return Address(host, port)

    def _raise_not_found(self, asked: Sequence[_Asked]) -> NoReturn:
        answered = [each for each in asked if not each.error]
        final = all(each.refuses or not each.error for each in asked)
        kind = LoginError if final else ConnectionError
        if any(self._name in each.masters for each in answered):
            raise ConnectionError(f"Sentinel says that the master {self._name} is down")
        if answered:
            known = sorted({name for each in answered for name in each.masters})[:_SHOWN_MASTERS]
            raise kind(
                f"redis sentinel at {answered[0].address} does not watch a master "
                f"{self._name}; it watches {', '.join(known) or 'none'}"
            )
        why = "; ".join(f"redis sentinel at {each.address}: {each.error}" for each in asked)
        raise kind(why)

    def _look(self, deadline: float) -> None:
        with self._turn.taken() as mine:
            if not mine:
                return
            try:
                address = self.find(deadline)
            except (LoginError, OSError) as error:
                code = LOGIN if isinstance(error, LoginError) else NO_ANSWER
                self._unknown = Refused(code, str(error))
                self._outage.began(self._unknown)
                return
            self._outage.ended()
            with self._lock:
                self._old = False
                old = self._node
                if old is not None and old.address == address:
                    old.hung_up = False
                    return
                if self._closed:
                    return
                self._node = Node(address, self._login, self._connections)
        if old is not None:
            log.warning(
                "kvcache: redis: %s is the master %s now, instead of %s (Sentinel); blocks go "
                "there", address, self._name, old.address,
            )  # fmt: skip
            old.close()


class _Asked:
    """One Sentinel for one look-up, as redis-py asks it."""

    def __init__(self, address: Address, login: Login, deadline: float) -> None:
        self.address = address
        self._login = login
        self._deadline = deadline
        self.masters: dict[str, dict[str, object]] = {}
        self.error = "it was not asked"
        self.refuses = False

    def sentinel_masters(self) -> dict[str, dict[str, object]]:
        """The masters that it watches, by name, with what redis-py looks at.

        Raises redis.ConnectionError when it does not say, whatever the cause.
        """
        try:
            # Half of what is left: one that hangs leaves time to ask another.
            self.masters = self._ask(halfway(self._deadline))
        except (LoginError, OSError, WireError) as error:
            self.refuses = isinstance(error, LoginError)
            self.error = str(error) or type(error).__name__
            raise redis.ConnectionError(self.error) from None
        self.error = ""
        return self.masters

    def _ask(self, deadline: float) -> dict[str, dict[str, object]]:
        with closing(self._login.connect(self.address, deadline)) as wire:
            said = wire.say(b"SENTINEL", b"MASTERS", deadline=deadline)
            if isinstance(said, Refused):
                raise error_of(said)
            masters: dict[str, dict[str, object]] = {}
            try:
                for flat in cast(Any, said):
                    facts = dict(zip(flat[::2], flat[1::2], strict=True))
                    where = wire.address(facts[b"ip"], int(facts[b"port"]))
                    flags = facts[b"flags"].split(b",")
                    masters[wire.readable(facts[b"name"])] = {
                        "ip": where.host,
                        "port": where.port,
                        "is_master": b"master" in flags,
                        "is_sdown": b"s_down" in flags,
                        "is_odown": b"o_down" in flags,
                        "num-other-sentinels": int(facts[b"num-other-sentinels"]),
                    }
            except (TypeError, ValueError, KeyError, AttributeError):
                raise WireError("it does not say which masters it watches") from None
            return masters
