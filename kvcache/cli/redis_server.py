"""Read the Redis or Valkey servers of a tier, for commands.

Invariants: reading a value does not count as a use of it on servers with `CLIENT NO-TOUCH` (7.2
and later; older ones count it in their LRU). An answer has the tier's limits: a deadline and a
number of bytes. This module limits lists of keys.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from kvcache.secrets import read_secret, redact

if TYPE_CHECKING:
    from kvcache.tiers.redis.resp import AnyReply, RespConnection
    from kvcache.tiers.redis.sockets import Address

WAIT_S = 10.0
"""The longest wait for a connection or an answer."""
MAX_KEYS = 20_000_000
"""The most keys that a server may list."""
QUIET_S = 60.0
"""How long a server may list keys of other programs only."""

_SCAN_COUNT = 500


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """The memory of a server. `limit_nbytes` is 0 without a limit."""

    used_nbytes: int
    limit_nbytes: int
    when_full: str  # the server's maxmemory-policy


class ServerError(Exception):
    """A server does not behave like Redis or Valkey."""


class RedisServers:
    """Connections to one server, or to each primary of a cluster."""

    def __init__(self, connections: Sequence[RespConnection]) -> None:
        self._connections = connections
        self._connection_of: dict[bytes, RespConnection] = {}
        for connection in connections:
            self._ask(connection, b"CLIENT", b"NO-TOUCH", b"ON")

    def sizes(self, pattern: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield the keys that match ``pattern`` and have a string, and its bytes.

        A key may be yielded twice.

        Raises:
            ServerError: the list of keys does not end.
        """
        from kvcache.tiers.redis.resp import command

        for connection in self._connections:
            for names in self._names(connection, pattern):
                commands = [command(b"STRLEN", name) for name in names]
                for name, nbytes in zip(
                    names, connection.exchange(commands, _deadline()), strict=True
                ):
                    if isinstance(nbytes, int) and nbytes:
                        self._connection_of[name] = connection
                        yield name, nbytes
                if len(self._connection_of) > MAX_KEYS:
                    raise ServerError(f"its list of keys has more than {MAX_KEYS:,} blocks")

    def _names(self, connection: RespConnection, pattern: bytes) -> Iterator[list[bytes]]:
        cursor, last_s = b"0", time.monotonic()
        while True:
            reply = self._ask(
                connection, b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % _SCAN_COUNT
            )
            match reply:
                case [bytes(cursor), list(names)] if all(isinstance(n, bytes) for n in names):
                    pass
                case _:
                    raise ServerError("its answer to SCAN is not one of Redis")
            if names:
                last_s = time.monotonic()
                yield list(dict.fromkeys(name for name in names if isinstance(name, bytes)))
            if cursor == b"0":
                return
            if time.monotonic() - last_s > QUIET_S:
                raise ServerError(f"its list of keys had no block for {QUIET_S:g} s")

    def load(self, name: bytes, into: memoryview) -> int:
        """Read a value of ``sizes``; return its bytes, 0 if it is absent or does not fit."""
        from kvcache.tiers.redis.resp import command

        (nbytes,) = self._connection_of[name].exchange(
            [command(b"GET", name, into=into)], _deadline()
        )
        return nbytes if isinstance(nbytes, int) else 0

    def beginning(self, name: bytes, nbytes: int) -> bytes:
        """Return the first ``nbytes`` bytes of a string on any server; empty if it is absent."""
        for connection in self._connections:
            reply = self._ask(connection, b"GETRANGE", name, b"0", b"%d" % (nbytes - 1))
            if isinstance(reply, bytes) and reply:
                return reply
        return b""

    def memory(self) -> ServerMemory | None:
        """Return the memory of a single server; None if it hides it, and for a cluster."""
        if len(self._connections) > 1:
            return None
        reply = self._ask(self._connections[0], b"INFO", b"memory")
        if not isinstance(reply, bytes):
            return None
        lines = (line.partition(b":") for line in reply.splitlines())
        facts = {name: value for name, _, value in lines}
        with suppress(KeyError, ValueError):
            return ServerMemory(
                int(facts[b"used_memory"]),
                int(facts[b"maxmemory"]),
                self._connections[0].printable(facts[b"maxmemory_policy"]),
            )
        return None

    def _ask(self, connection: RespConnection, *words: bytes) -> AnyReply:
        return connection.call(*words, deadline=_deadline())


@contextmanager
def connected(options: Mapping[str, object]) -> Iterator[RedisServers]:
    """Connect to the servers of a tier's options, with the tier's defaults for missing ones.

    Raises:
        ValueError: a server cannot be reached or read, here or inside the ``with``.
    """
    try:
        import_module("redis")
    except ImportError as error:
        raise ValueError(f"redis needs packages: pip install 'kvcache[redis]' ({error})") from error
    from kvcache.tiers.redis.connect import ConnectionRejectedError, parse_url
    from kvcache.tiers.redis.resp import ProtocolError

    parse_url(str(options["url"]))  # raises for an invalid URL
    try:
        with ExitStack() as opened:
            yield RedisServers([opened.enter_context(closing(each)) for each in _connect(options)])
    except (ConnectionRejectedError, OSError, ServerError, ProtocolError) as error:
        raise ValueError(f"{options['url']} cannot be read: {redact(str(error))}") from None


def _connect(options: Mapping[str, object]) -> Iterator[RespConnection]:
    """Yield a connection to each server that has keys."""
    from kvcache.tiers.redis.cluster import fetch_slot_ranges
    from kvcache.tiers.redis.connect import Connector, parse_url
    from kvcache.tiers.redis.sentinel import SentinelMaster

    def option(name: str) -> str:
        return str(options.get(name, ""))

    def connector(prefix: str) -> Connector:
        variable = f"{prefix}password_env"
        password = read_secret(option(variable), variable)
        ca_file, cert_file, key_file = map(option, ("ca_file", "cert_file", "key_file"))
        database, username = 0 if prefix else target.database, option(f"{prefix}username")
        return Connector(target.tls, database, username, password, ca_file, cert_file, key_file)

    target = parse_url(option("url"))
    server_connector = connector("")
    addresses: Sequence[Address] = target.addresses[:1]
    if target.master:
        sentinel_connector = connector("sentinel_")
        master = SentinelMaster(
            target.addresses, target.master, sentinel_connector, sentinel_connector, 1
        )
        addresses = [master.find_master(_deadline())]
    elif options.get("cluster"):
        ranges = fetch_slot_ranges(server_connector, target.addresses[0], _deadline())
        addresses = list(dict.fromkeys(address for _, _, address in ranges))
    for address in addresses:
        yield server_connector.connect(address, _deadline())


def _deadline() -> float:
    return time.monotonic() + WAIT_S
