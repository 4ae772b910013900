"""The tier on Redis or Valkey: one server, a cluster, or a master that Sentinels name.

All engines that reach the servers share the blocks. The keys in the server::

    kvcache:1:<namespace, hex>:<key, hex>  ->  one value: a block in its frame
    kvcache:1:reset:<namespace, hex>       ->  random bytes, once the namespace was reset
    kvcache:1:about:<namespace, hex>       ->  a JSON object that describes the namespace

Invariants:

* A block is one key with one value, written by one ``SET ... NX``. So no block is stored in part,
  and if several engines write the same block, only the first write has an effect.
* A call ends within ``timeout_s``, including name resolution, connecting, login and replies. No
  buffer is used after that.
* A server's error for one key is a miss or a decline of that key, and is logged once for each code.
  A call without any answer raises ConnectionError.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

from opentelemetry.trace import INVALID_SPAN, Span

from kvcache import telemetry
from kvcache.inputs import check_files, check_timeout
from kvcache.keys import DIGEST_NBYTES, RESET_NBYTES, Branch, namespace_after_reset
from kvcache.process import bind_to_process
from kvcache.reasons import ReasonCounter
from kvcache.secrets import read_secret
from kvcache.tier import Tier, TierUsage
from kvcache.tiers.redis.cluster import Cluster
from kvcache.tiers.redis.connect import Connector, parse_url
from kvcache.tiers.redis.node import NO_ANSWER, REJECTED, Node, ServerGroup, SingleServer
from kvcache.tiers.redis.resp import (
    MAX_CLIENTS,
    TOO_LONG,
    UNKNOWN_COMMAND,
    Command,
    ErrorReply,
    Reply,
    command,
)
from kvcache.tiers.redis.sentinel import SentinelMaster
from kvcache.worker_pool import WorkerPool

log = logging.getLogger(__name__)

_SERVER_ERRORS = {
    NO_ANSWER, REJECTED, MAX_CLIENTS, UNKNOWN_COMMAND,
    "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "NOAUTH",
}  # fmt: skip
"""Codes of errors of a whole server, which it returns for every key."""

_PERMANENT_ERRORS = {REJECTED, UNKNOWN_COMMAND, "NOAUTH", "NOPERM", "MOVED"}
"""Codes of errors that do not pass by waiting: the tier cannot be opened."""

_UNLOGGED_ERRORS = {"MOVED", "ASK", "TRYAGAIN", NO_ANSWER, REJECTED}
"""Codes that are normal in a cluster, or that :class:`Node` has logged."""

_FOREIGN_VALUE_ERRORS = {TOO_LONG, "WRONGTYPE"}
"""Codes for a value that no tier has written."""

_CLUSTER_THREADS = 32  # nodes that one call asks at the same time
_DESCRIPTION_TTL_S = 30 * 86400  # after an engine opened the namespace


class RedisTier(Tier):
    """A tier on Redis or Valkey.

    Args:
        url: ``redis://HOST[:PORT][/DATABASE]``, ``rediss://...`` for TLS, or
            ``unix:///PATH[?db=DATABASE]``; for a cluster, any node. With Sentinel
            ``redis+sentinel://HOST[:PORT][,HOST[:PORT]...]/MASTER[/DATABASE]``, or
            ``rediss+sentinel://...`` for TLS to both. Without user and password.
        cluster: whether the server is a cluster.
        username: the user for ACLs; "" is the default user.
        password_env: the environment variable with the password; "" is no password.
        sentinel_username: the user for ACLs of the Sentinels; "" is the default user.
        sentinel_password_env: the environment variable with the Sentinels' password; "" is no
            password.
        ca_file: certificates to trust instead of the system's.
        cert_file: the client's certificate, if the server requires one.
        key_file: the key of that certificate.
        ttl_s: seconds until a block expires that no engine loads; 0 never expires it.
        connections: the number of connections to a node at the same time.
        timeout_s: seconds after which a call ends.

    Attributes:
        servers: the servers, for tests and tools.
        reset_read_interval_s: seconds between reads of the key that a reset left.

    Raises:
        ValueError: an option is invalid, or the server rejects the tier. A server that cannot be
            reached is logged instead, because it may come back.
    """

    call_nbytes = 4 << 20  # so that data is still in the CPU's cache when it is verified
    reset_read_interval_s: float = 60.0

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
        target = parse_url(url)
        if cluster and target.master:
            raise ValueError("cluster is true; a cluster is not watched by Sentinel")
        if cluster and (target.database or target.addresses[0].path):
            raise ValueError("cluster is true; a cluster has TCP hosts, and only database 0")
        if not target.master and (sentinel_username or sentinel_password_env):
            raise ValueError(
                "sentinel_username and sentinel_password_env are for a url with redis+sentinel://"
            )
        if not target.tls and (ca_file or cert_file or key_file):
            raise ValueError("ca_file, cert_file and key_file are for a url with rediss://")
        if ttl_s < 0:
            raise ValueError(f"ttl_s is {ttl_s}; it takes seconds, or 0 to never expire")
        if connections < 1:
            raise ValueError(f"connections is {connections}; it must be at least 1")
        check_timeout(timeout_s)
        check_files(ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        password = read_secret(password_env, "password_env")
        sentinel_password = read_secret(sentinel_password_env, "sentinel_password_env")
        connector, sentinel_connector = (
            Connector(
                target.tls, database, user, own_password, ca_file, cert_file, key_file,
                secrets=(password, sentinel_password),
            )
            for database, user, own_password in (
                (target.database, username, password), (0, sentinel_username, sentinel_password)
            )
        )  # fmt: skip
        if target.tls:
            connector.check_certificates()
        self.servers: ServerGroup
        if target.master:
            self.servers = SentinelMaster(
                target.addresses, target.master, sentinel_connector, connector, connections
            )
        elif cluster:
            self.servers = Cluster(target.addresses[0], connector, connections)
        else:
            self.servers = SingleServer(Node(target.addresses[0], connector, connections))
        self._target = target
        ttl = str(ttl_s).encode()
        self._get = (b"GETEX", b"EX", ttl) if ttl_s else (b"GET",)
        self._ttl = (b"EX", ttl) if ttl_s else ()
        self._reset_key: bytes | None = None  # the key in the server that the last reset left
        self._reset_read_at = 0.0
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._errors = ReasonCounter()  # by code, of all commands
        self._declined = ReasonCounter()
        self._closed = False
        self._threads = WorkerPool(
            "redis", _CLUSTER_THREADS if cluster else 0
        )  # for all nodes but one
        try:
            self._check_server()
        except BaseException:
            self.close()
            raise
        bind_to_process(self)

    def _check_server(self) -> None:
        """Raise ValueError if the server rejects the tier, or is not of the kind in ``url``."""
        names = [b"kvcache:1:start:%d" % at for at in range(64)]  # keys of every node of a cluster
        replies = self._execute("EXISTS", names, [command(b"EXISTS", name) for name in names])
        for reply in replies:
            if isinstance(reply, ErrorReply) and reply.code in _PERMANENT_ERRORS:
                raise ValueError(
                    f"url is valid, but the server rejects the tier: {reply.text}"
                    f"{self._hint(reply)}"
                )

    def _hint(self, error: ErrorReply) -> str:
        """Return a remedy for the message if the server is not of the kind in ``url``."""
        if error.code == "MOVED":
            return "; if it is a cluster, set cluster = true"
        if "ERR unknown command" not in error.text:
            return ""
        if self._target.master:
            return "; if it is not a Sentinel, url is redis://HOST:PORT"
        return "; if it is a Sentinel, url is redis+sentinel://HOST:PORT/MASTER"

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        names = [block_name(key) for key in keys]
        replies = self._request("EXISTS", names, [command(b"EXISTS", name) for name in names])
        return [reply == 1 for reply in replies]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        """As the contract says; a value that cannot be a block is removed, to make room for one."""
        names = [block_name(key) for key in keys]
        verb, *options = self._get
        commands = [
            command(verb, name, *options, into=view) for name, view in zip(names, into, strict=True)
        ]
        replies = self._request(verb.decode(), names, commands)
        foreign = [
            key
            for key, reply in zip(keys, replies, strict=True)
            if reply == 0 or (isinstance(reply, ErrorReply) and reply.code in _FOREIGN_VALUE_ERRORS)
        ]
        if foreign:
            self.remove(foreign)
        return [reply if isinstance(reply, int) else 0 for reply in replies]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        names = [block_name(key) for key in keys]
        commands = [
            command(b"SET", name, block, b"NX", *self._ttl)
            for name, block in zip(names, blocks, strict=True)
        ]
        if (
            self._reset_key is not None
            and time.monotonic() - self._reset_read_at >= self.reset_read_interval_s
        ):
            # A server evicts the keys that are read least, and must keep this one.
            self._reset_read_at = time.monotonic()
            names.append(self._reset_key)
            commands.append(
                command(b"GET", self._reset_key, into=memoryview(bytearray(RESET_NBYTES)))
            )
        replies = self._request("SET", names, commands)[: len(keys)]
        for reply in replies:
            if isinstance(reply, ErrorReply):
                self._declined.add(reply.code)
        return [reply is None or reply == 1 for reply in replies]  # None: the key exists already

    def store_branches(
        self, branches: Sequence[Branch], blocks: Sequence[memoryview]
    ) -> list[bool]:
        return self.store([key for keys, _ in branches for key in keys], blocks)

    def remove(self, keys: Sequence[bytes]) -> None:
        names = [block_name(key) for key in keys]
        self._request("UNLINK", names, [command(b"UNLINK", name) for name in names])

    def resolve(self, namespace: bytes, about: str) -> bytes:
        reset = bytearray(RESET_NBYTES)
        name = reset_name(namespace)
        [reply] = self._request("GET", [name], [command(b"GET", name, into=memoryview(reset))])
        if reply is not None and reply != RESET_NBYTES:
            text = reply.text if isinstance(reply, ErrorReply) else "the value has another length"
            raise ConnectionError(f"cannot read whether the namespace was reset: {text}")
        if reply:
            self._reset_key = name
        resolved = namespace_after_reset(namespace, bytes(reset) if reply else b"")
        if about:
            name, ttl_s = description_name(resolved), max(_DESCRIPTION_TTL_S, self._ttl_s)
            set_description = command(b"SET", name, about.encode(), b"EX", b"%d" % ttl_s)
            self._request("SET", [name], [set_description])
        return resolved

    def forget(self, namespace: bytes) -> None:
        """As the contract says. Engines that run now still find the old blocks."""
        name = reset_name(namespace)
        [reply] = self._request("SET", [name], [command(b"SET", name, os.urandom(RESET_NBYTES))])
        if reply != 1:
            text = reply.text if isinstance(reply, ErrorReply) else "no answer"
            raise ConnectionError(f"cannot write the reset: {text}")
        self._reset_key = name

    def usage(self) -> TierUsage:
        return TierUsage(declined_blocks=self._declined.counts())

    def close(self) -> None:
        self._closed = True
        self.servers.close()
        self._threads.close(0.0)

    def _request(
        self, verb: str, names: Sequence[bytes], commands: Sequence[Command]
    ) -> list[Reply]:
        """Return the replies; raise ConnectionError if no server answered any command."""
        if self._closed:
            return [ErrorReply(NO_ANSWER, "the tier is closed")] * len(names)
        replies = self._execute(verb, names, commands)
        errors = [reply for reply in replies if isinstance(reply, ErrorReply)]
        if errors and len(errors) == len(replies) and all(e.code in _SERVER_ERRORS for e in errors):
            raise ConnectionError(errors[0].text)
        return replies

    def _execute(
        self, verb: str, names: Sequence[bytes], commands: Sequence[Command]
    ) -> list[Reply]:
        """Return the reply to each command; ask several nodes at the same time, in threads."""
        deadline = time.monotonic() + self._timeout_s
        replies: list[Reply] = [None] * len(names)
        shares: dict[Node, list[int]] = {}
        for at, node in enumerate(self.servers.nodes_for(names, deadline)):
            if isinstance(node, Node):
                shares.setdefault(node, []).append(at)
            else:
                replies[at] = node

        parent_span = telemetry.current_span()  # not known in other threads

        def execute_on(node: Node, share: Sequence[int]) -> None:
            span = self._start_span(parent_span, verb, node, len(share))
            answers = node.execute([commands[at] for at in share], deadline)
            error = next((reply.code for reply in answers if isinstance(reply, ErrorReply)), None)
            status = {"db.response.status_code": error} if error else {}
            telemetry.end_span(span, status, error=error)
            for at, reply in zip(share, answers, strict=True):
                replies[at] = reply

        calls: list[Future[None]] = []
        try:
            for node, share in [*shares.items()][1:]:
                calls.append(self._threads.submit(execute_on, node, share))
            for node, share in [*shares.items()][:1]:
                execute_on(node, share)
        finally:
            wait(calls)  # they use the caller's memory
        for call in calls:
            call.result()
        for reply in replies:
            if isinstance(reply, ErrorReply):
                self._observe_error(reply)
        return replies

    def _start_span(self, parent: Span, verb: str, node: Node, count: int) -> Span:
        """Start a span for one exchange, by OpenTelemetry's conventions for Redis."""
        if not parent.is_recording():
            return INVALID_SPAN
        address = node.address
        name = f"PIPELINE {verb}" if count > 1 else verb
        attributes: dict[str, str | int] = {
            "db.system.name": "redis",
            "db.operation.name": name,
            "db.namespace": str(self._target.database),
            "server.address": address.path or address.host,
        }
        if not address.path:
            attributes["server.port"] = address.port
        if count > 1:
            attributes["db.operation.batch.size"] = count
        return telemetry.start_client_child(parent, name, attributes)

    def _observe_error(self, error: ErrorReply) -> None:
        self.servers.observe_error(error)
        if error.code not in _UNLOGGED_ERRORS and self._errors.add(error.code):
            log.warning(
                "kvcache: redis: a server returned an error (%s); its keys are missed or declined",
                error.text,
            )


def block_name(key: bytes) -> bytes:
    """Return the key of a block in the server: its namespace and its key, in hex."""
    namespace, block = key[:DIGEST_NBYTES].hex(), key[DIGEST_NBYTES:].hex()
    return f"kvcache:1:{namespace}:{block}".encode()


def reset_name(namespace: bytes) -> bytes:
    """Return the key in the server that has the last reset of a namespace."""
    return f"kvcache:1:reset:{namespace.hex()}".encode()


def description_name(resolved: bytes) -> bytes:
    """Return the key in the server that has the description of a resolved namespace."""
    return f"kvcache:1:about:{resolved.hex()}".encode()
