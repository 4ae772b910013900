"""The Redis or Valkey servers that a tier's options name, for commands that look at them.

Always true: looking at a value is no use of it, as far as the server can be asked for that (`CLIENT
NO-TOUCH`, from 7.2; else its LRU sees one). What a server says has the tier's own limits: a
deadline for each answer, and bytes; an endless list of keys has one here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from kvcache.secrets import redact

if TYPE_CHECKING:
    from kvcache.tiers.redis.resp import Said, Wire
    from kvcache.tiers.redis.sockets import Address

WAIT_S = 10.0
"""For an answer, and for connecting."""
KEYS = 20_000_000
"""That a server may list, at most."""
QUIET_S = 60.0
"""That a server may go on listing without one that is ours."""

_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """What a server has, of all that it keeps, and what it does when that is full."""

    used_nbytes: int
    limit_nbytes: int  # 0: none
    when_full: str  # its maxmemory-policy


class ServerError(Exception):
    """A server does what none does that keeps blocks."""


class RedisServers:
    """One server, or the primaries of a cluster; a connection to each."""

    def __init__(self, wires: Sequence[Wire]) -> None:
        self._wires = wires
        self._at: dict[bytes, Wire] = {}
        for wire in wires:
            self._say(wire, b"CLIENT", b"NO-TOUCH", b"ON")

    def sizes(self, pattern: bytes) -> Iterator[tuple[bytes, int]]:
        """The names of a pattern that have a string, and the bytes of each. Some may come twice.

        Raises ServerError for a server that does not come to an end.
        """
        from kvcache.tiers.redis.resp import command

        for wire in self._wires:
            for names in self._names(wire, pattern):
                asked = [command(b"STRLEN", name) for name in names]
                for name, nbytes in zip(names, wire.exchange(asked, _soon()), strict=True):
                    if isinstance(nbytes, int) and nbytes:
                        self._at[name] = wire
                        yield name, nbytes
                if len(self._at) > KEYS:
                    raise ServerError(f"it lists more than {KEYS:,} blocks, and does not end")

    def _names(self, wire: Wire, pattern: bytes) -> Iterator[list[bytes]]:
        cursor, heard = b"0", time.monotonic()
        while True:
            said = self._say(wire, b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % _AT_ONCE)
            match said:
                case [bytes(cursor), list(names)] if all(isinstance(n, bytes) for n in names):
                    pass
                case _:
                    raise ServerError("it does not list its keys as Redis does")
            if names:
                heard = time.monotonic()
                yield list(dict.fromkeys(name for name in names if isinstance(name, bytes)))
            if cursor == b"0":
                return
            if time.monotonic() - heard > QUIET_S:
                raise ServerError(f"it listed no block for {QUIET_S:g} s, and does not end")

    def load(self, name: bytes, into: memoryview) -> int:
        """Read a value that ``sizes`` named; its bytes, 0 if it is not there or does not fit."""
        from kvcache.tiers.redis.resp import command

        (nbytes,) = self._at[name].exchange([command(b"GET", name, into=into)], _soon())
        return nbytes if isinstance(nbytes, int) else 0

    def beginning(self, name: bytes, nbytes: int) -> bytes:
        """The first bytes of a string, whichever server has it; none if it is not there."""
        for wire in self._wires:
            said = self._say(wire, b"GETRANGE", name, b"0", b"%d" % (nbytes - 1))
            if isinstance(said, bytes) and said:
                return said
        return b""

    def memory(self) -> ServerMemory | None:
        """What one server says; None of a cluster, and where a managed one does not tell."""
        if len(self._wires) > 1:
            return None
        said = self._say(self._wires[0], b"INFO", b"memory")
        if not isinstance(said, bytes):
            return None
        lines = (line.partition(b":") for line in said.splitlines())
        facts = {name: value for name, _, value in lines}
        with suppress(KeyError, ValueError):
            return ServerMemory(
                int(facts[b"used_memory"]),
                int(facts[b"maxmemory"]),
                self._wires[0].readable(facts[b"maxmemory_policy"]),
            )
        return None

    def _say(self, wire: Wire, *words: bytes) -> Said:
        return wire.say(*words, deadline=_soon())


@contextmanager
def connected(options: Mapping[str, object]) -> Iterator[RedisServers]:
    """The servers, as the tier's options say; the tier's defaults where they do not.

    Raises ValueError where they cannot be had, and for what goes wrong meanwhile.
    """
    try:
        import_module("redis")
    except ImportError as error:
        raise ValueError(f"redis needs more: pip install 'kvcache[redis]' ({error})") from error
    from kvcache.tiers.redis.connect import LoginError, read_url
    from kvcache.tiers.redis.resp import WireError

    read_url(str(options["url"]))  # what is wrong with it, it says itself
    try:
        with ExitStack() as opened:
            yield RedisServers([opened.enter_context(closing(wire)) for wire in _wires(options)])
    except (LoginError, OSError, ServerError, WireError) as error:
        raise ValueError(f"{options['url']} cannot be read: {redact(str(error))}") from None


def _wires(options: Mapping[str, object]) -> Iterator[Wire]:
    """A connection to each server that has keys."""
    from kvcache.tiers.redis.cluster import slots_of
    from kvcache.tiers.redis.connect import Login, read_password, read_url
    from kvcache.tiers.redis.sentinel import Watched

    def option(name: str) -> str:
        return str(options.get(name, ""))

    def login(kind: str) -> Login:
        variable = f"{kind}password_env"
        password = read_password(option(variable), variable)
        ca_file, cert_file, key_file = map(option, ("ca_file", "cert_file", "key_file"))
        database, username = 0 if kind else place.database, option(f"{kind}username")
        return Login(place.tls, database, username, password, ca_file, cert_file, key_file)

    place = read_url(option("url"))
    ours = login("")
    where: Sequence[Address] = place.addresses[:1]
    if place.master:
        asking = login("sentinel_")
        where = [Watched(place.addresses, place.master, asking, asking, 1).find(_soon())]
    elif options.get("cluster"):
        ranges = slots_of(ours, place.addresses[0], _soon())
        where = list(dict.fromkeys(address for _, _, address in ranges))
    for address in where:
        yield ours.connect(address, _soon())


def _soon() -> float:
    return time.monotonic() + WAIT_S
