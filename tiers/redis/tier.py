"""Blocks in a Redis or Valkey server, or a cluster of them, for every engine that can reach it.

Sentinels may say which server it is.

::

    kvcache:1:<namespace, hex>:<key, hex>  ->  one value: a block in its frame
    kvcache:1:reset:<namespace, hex>       ->  random bytes, once it was reset
    kvcache:1:about:<namespace, hex>       ->  a JSON object that says what the namespace is

Always true here:

* One key and one value per block, written by one ``SET ... NX``: there is no half of a block, and
  of engines that write the same one, one does.
* A call ends ``timeout_s`` after it began, whatever it waits for: a name, a connection, the
  greeting, a reply. No buffer is touched after that.
* What a server says of one key is that key's miss or decline, logged once for each kind of error.
  A call of which no key was answered is a ConnectionError.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.keys import DIGEST_NBYTES, namespace_after_reset
from kvcache.process import bind_to_process
from kvcache.tier import Tier
from kvcache.tiers.redis.cluster import LOGIN, NO_ANSWER, Cluster, Node, OneServer, ServerGroup
from kvcache.tiers.redis.connect import Login, check_files, read_password, read_url
from kvcache.tiers.redis.resp import (
    MAX_CLIENTS,
    TOO_LONG,
    UNKNOWN_COMMAND,
    Command,
    Refused,
    Reply,
    command,
)
from kvcache.tiers.redis.sentinel import Watched
from kvcache.worker_pool import WorkerPool

log = logging.getLogger(__name__)

_NOBODY = {
    NO_ANSWER, LOGIN, MAX_CLIENTS, UNKNOWN_COMMAND,
    "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "NOAUTH",
}  # fmt: skip
"""Codes that speak of a whole server: it will say the same of every key."""

_FOR_GOOD = {LOGIN, UNKNOWN_COMMAND, "NOAUTH", "NOPERM", "MOVED"}
"""Codes that waiting does not mend: an error at start."""

_USUAL = {"MOVED", "ASK", "TRYAGAIN", NO_ANSWER, LOGIN}
"""Codes that a cluster answers with in the course of its life, or that a node has logged."""

_UNFIT = {TOO_LONG, "WRONGTYPE"}
"""Codes for a value that is none of ours."""

_NODES_AT_ONCE = 32
_MOST_TOLD = 16  # kinds of errors: a server may make up any number
_ABOUT_S = 30 * 86400  # that a description stays after an engine opened its namespace
_USE_RESET_S = 60.0
_TIMEOUT_S = 3600

RESET_NBYTES = 16
"""Random bytes that say which reset of a namespace was the last."""


class RedisTier(Tier):
    """A tier on Redis or Valkey.

    Args:
        url: ``redis://HOST[:PORT][/DATABASE]``, ``rediss://...`` for TLS, or
            ``unix:///PATH[?db=DATABASE]``; of a cluster any node. With Sentinel
            ``redis+sentinel://HOST[:PORT][,HOST[:PORT]...]/MASTER[/DATABASE]``, or
            ``rediss+sentinel://...`` for TLS to both. No user, no password.
        cluster: whether it is a cluster.
        username: for ACLs; "" is the default user.
        password_env: the environment variable that has the password; "" is none.
        sentinel_username: for ACLs of the Sentinels; "" is the default user.
        sentinel_password_env: the environment variable that has the Sentinels' password; "" is
            none.
        ca_file: certificates to trust instead of the system's.
        cert_file: our certificate, where the server asks for one.
        key_file: its key.
        ttl_s: seconds after which a block that nobody has loaded is gone; 0 keeps it for as long
            as the server likes.
        connections: to a node at once.
        timeout_s: after which a call ends.

    Raises:
        ValueError: for an option that cannot be, and where the server can be reached but refuses
            us. One that cannot be reached is a warning: it may come back.
    """

    call_nbytes = 4 << 20  # what comes is still in a processor's cache when it is verified

    def __init__(
        self,
        *,
        url: str,
        cluster: bool = False,
        username: str = "",
        password_env: str = "",
        sentinel_username: str = "",
        sentinel_password_env: str = "",
        ca_file: str = "",
        cert_file: str = "",
        key_file: str = "",
        ttl_s: int = 0,
        connections: int = 4,
        timeout_s: float = 1.0,
    ) -> None:
        place = read_url(url)
        if cluster and place.master:
            raise ValueError("cluster is true; a cluster is not watched by Sentinel")
        if cluster and (place.database or place.addresses[0].path):
            raise ValueError("cluster is true; a cluster has hosts, and no database but 0")
        if not place.master and (sentinel_username or sentinel_password_env):
            raise ValueError(
                "sentinel_username and sentinel_password_env are for a url with redis+sentinel://"
            )
        if not place.tls and (ca_file or cert_file or key_file):
            raise ValueError("ca_file, cert_file and key_file are for a url with rediss://")
        if ttl_s < 0:
            raise ValueError(f"ttl_s is {ttl_s}; it takes seconds, or 0 for no end")
        if connections < 1:
            raise ValueError(f"connections is {connections}; it must be at least 1")
        if not 0 < timeout_s <= _TIMEOUT_S:  # nan is not
            raise ValueError(f"timeout_s is {timeout_s}; it takes seconds above 0, to {_TIMEOUT_S}")
        check_files(ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        password = read_password(password_env)
        watch_password = read_password(sentinel_password_env, "sentinel_password_env")
        login, asking = (
            Login(
                place.tls, number, user, its, ca_file, cert_file, key_file,
                secrets=(password, watch_password),
            )
            for number, user, its in (
                (place.database, username, password), (0, sentinel_username, watch_password)
            )
        )  # fmt: skip
        if place.tls:
            login.check_certificates()
        self._servers: ServerGroup
        if place.master:
            self._servers = Watched(place.addresses, place.master, asking, login, connections)
        elif cluster:
            self._servers = Cluster(place.addresses[0], login, connections)
        else:
            self._servers = OneServer(Node(place.addresses[0], login, connections))
        self._place = place
        ttl = str(ttl_s).encode()
        self._get = (b"GETEX", b"EX", ttl) if ttl_s else (b"GET",)
        self._ttl = (b"EX", ttl) if ttl_s else ()
        self._reset: bytes | None = None  # where the last reset of our namespace is, if it had one
        self._reset_used = 0.0
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._told: set[str] = set()
        self._closed = False
        self._threads = WorkerPool("redis", _NODES_AT_ONCE if cluster else 0)  # for its other nodes
        try:
            self._greet()
        except BaseException:
            self.close()
            raise
        bind_to_process(self)

    def _greet(self) -> None:
        """See whether a server that can be reached lets us in and is what the profile says."""
        names = [b"kvcache:1:start:%d" % at for at in range(64)]  # some in any part of a cluster
        replies = self._ask("EXISTS", names, [command(b"EXISTS", name) for name in names])
        for reply in replies:
            if isinstance(reply, Refused) and reply.code in _FOR_GOOD:
                raise ValueError(
                    f"url is right, and the server there refuses: {reply.text}{self._hint(reply)}"
                )

    def _hint(self, refused: Refused) -> str:
        """What else the server may be, as far as its error tells."""
        if refused.code == "MOVED":
            return "; is it a cluster? then set cluster = true"
        if "ERR unknown command" not in refused.text:
            return ""
        if self._place.master:
            return "; is it no Sentinel? then url is redis://HOST:PORT"
        return "; is it a Sentinel? then url is redis+sentinel://HOST:PORT/MASTER"

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        names = [name_of(key) for key in keys]
        replies = self._answers("EXISTS", names, [command(b"EXISTS", name) for name in names])
        return [reply == 1 for reply in replies]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        """As the contract says. What is there and cannot be a block is removed, or it would be in
        the way of the block for ever."""
        names = [name_of(key) for key in keys]
        verb, *options = self._get
        commands = [
            command(verb, name, *options, into=view) for name, view in zip(names, into, strict=True)
        ]
        replies = self._answers(verb.decode(), names, commands)
        unfit = [
            key
            for key, reply in zip(keys, replies, strict=True)
            if reply == 0 or (isinstance(reply, Refused) and reply.code in _UNFIT)
        ]
        if unfit:
            self.remove(unfit)
        return [reply if isinstance(reply, int) else 0 for reply in replies]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        names = [name_of(key) for key in keys]
        commands = [
            command(b"SET", name, block, b"NX", *self._ttl)
            for name, block in zip(names, blocks, strict=True)
        ]
        if self._reset is not None and time.monotonic() - self._reset_used >= _USE_RESET_S:
            # Read now and then what a reset left: a server evicts what is read least.
            self._reset_used = time.monotonic()
            names.append(self._reset)
            commands.append(command(b"GET", self._reset, into=memoryview(bytearray(RESET_NBYTES))))
        replies = self._answers("SET", names, commands)[: len(keys)]
        return [reply is None or reply == 1 for reply in replies]  # None: it was there

    def remove(self, keys: Sequence[bytes]) -> None:
        names = [name_of(key) for key in keys]
        self._answers("UNLINK", names, [command(b"UNLINK", name) for name in names])

    def resolve(self, namespace: bytes, about: str) -> bytes:
        found = bytearray(RESET_NBYTES)
        name = reset_name_of(namespace)
        [reply] = self._answers("GET", [name], [command(b"GET", name, into=memoryview(found))])
        if reply is not None and reply != RESET_NBYTES:
            text = reply.text if isinstance(reply, Refused) else "it has another length"
            raise ConnectionError(f"whether the namespace was reset cannot be read: {text}")
        if reply:
            self._reset = name
        called = namespace_after_reset(namespace, bytes(found) if reply else b"")
        if about:
            name, ttl_s = about_name_of(called), max(_ABOUT_S, self._ttl_s)
            told = command(b"SET", name, about.encode(), b"EX", b"%d" % ttl_s)
            self._answers("SET", [name], [told])
        return called

    def forget(self, namespace: bytes) -> None:
        """As the contract says. Engines that run keep what they have until they open it again."""
        name = reset_name_of(namespace)
        [reply] = self._answers("SET", [name], [command(b"SET", name, os.urandom(RESET_NBYTES))])
        if reply != 1:
            text = reply.text if isinstance(reply, Refused) else "no answer"
            raise ConnectionError(f"the reset cannot be written: {text}")
        self._reset = name

    def close(self) -> None:
        self._closed = True
        self._servers.close()
        self._threads.close(0.0)

    def _answers(
        self, verb: str, names: Sequence[bytes], commands: Sequence[Command]
    ) -> list[Reply]:
        """The reply to each command. Raises ConnectionError if nobody replied to any."""
        if self._closed:
            return [Refused(NO_ANSWER, "the tier is closed")] * len(names)
        replies = self._ask(verb, names, commands)
        refused = [reply for reply in replies if isinstance(reply, Refused)]
        if refused and len(refused) == len(replies) and all(r.code in _NOBODY for r in refused):
            raise ConnectionError(refused[0].text)
        return replies

    def _ask(self, verb: str, names: Sequence[bytes], commands: Sequence[Command]) -> list[Reply]:
        """The reply to each command, of each node in its own thread when there are several."""
        deadline = time.monotonic() + self._timeout_s
        replies: list[Reply] = [None] * len(names)
        shares: dict[Node, list[int]] = {}
        for at, node in enumerate(self._servers.nodes_of(names, deadline)):
            if isinstance(node, Node):
                shares.setdefault(node, []).append(at)
            else:
                replies[at] = node

        above = telemetry.current_span()  # threads do not know it

        def ask(node: Node, share: Sequence[int]) -> None:
            span = self._call(above, verb, node, len(share))
            answers = node.ask([commands[at] for at in share], deadline)
            wrong = next((reply.code for reply in answers if isinstance(reply, Refused)), None)
            status = {"db.response.status_code": wrong} if wrong else {}
            telemetry.end_span(span, status, error=wrong)
            for at, reply in zip(share, answers, strict=True):
                replies[at] = reply

        asked: list[Future[None]] = []
        try:
            for node, share in [*shares.items()][1:]:
                asked.append(self._threads.submit(ask, node, share))
            for node, share in [*shares.items()][:1]:
                ask(node, share)
        finally:
            wait(asked)  # they write into the caller's memory
        for answer in asked:
            answer.result()
        for reply in replies:
            if isinstance(reply, Refused):
                self._heard(reply)
        return replies

    def _call(self, above: Span, verb: str, node: Node, count: int) -> Span:
        """A span of one exchange with a server, by OpenTelemetry's conventions for Redis."""
        if not above.is_recording():
            return INVALID_SPAN
        address = node.address
        name = f"PIPELINE {verb}" if count > 1 else verb
        attributes: dict[str, str | int] = {
            "db.system.name": "redis",
            "db.operation.name": name,
            "db.namespace": str(self._place.database),
            "server.address": address.path or address.host,
        }
        if not address.path:
            attributes["server.port"] = address.port
        if count > 1:
            attributes["db.operation.batch.size"] = count
        return telemetry.start_client_child(above, name, attributes)

    def _heard(self, refused: Refused) -> None:
        self._servers.heard(refused)
        new = refused.code not in _USUAL and refused.code not in self._told
        if new and len(self._told) < _MOST_TOLD:
            self._told.add(refused.code)
            log.warning("kvcache: redis answers %s", refused.text)


def name_of(key: bytes) -> bytes:
    """What a block is called in the server: its namespace and its key, for people to read."""
    namespace, own = key[:DIGEST_NBYTES].hex(), key[DIGEST_NBYTES:].hex()
    return f"kvcache:1:{namespace}:{own}".encode()


def reset_name_of(namespace: bytes) -> bytes:
    """Where the last reset of a namespace is."""
    return f"kvcache:1:reset:{namespace.hex()}".encode()


def about_name_of(called: bytes) -> bytes:
    """Where the description of a namespace is, by the name that it has here."""
    return f"kvcache:1:about:{called.hex()}".encode()
