"""Where a server is, and how a connection to it is made, with what a profile says.

Always true:

* A password is read from the environment and is in no message, log or ``repr``. A URL that holds
  one is refused, and not repeated.
* A connection is there, with its greeting over, by the deadline of the call that needs it, or not
  at all.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvcache.secrets import may_be_secret, redact
from kvcache.tiers.redis.resp import MAX_CLIENTS, Refused, Wire, WireError, command
from kvcache.tiers.redis.sockets import Address, open_socket

FORMS = (
    "redis://HOST[:PORT][/DATABASE], redis+sentinel://HOST[:PORT][,HOST...]/MASTER[/DATABASE], "
    "rediss... with TLS, or unix:///PATH[?db=DATABASE]"
)

SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "unix")

_USUAL_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_MASTER = re.compile(r"[A-Za-z0-9._-]+")
_PASSES = {MAX_CLIENTS, "LOADING", "BUSY", "MASTERDOWN"}
"""Codes with which a server refuses everybody, and not for good."""


class LoginError(Exception):
    """The server is there and refuses the connection: trying again does not help."""


def error_of(refused: Refused) -> WireError | LoginError:
    """What to raise where a server refuses what a connection begins with."""
    return (WireError if refused.code in _PASSES else LoginError)(refused.text)


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says.

    Attributes:
        addresses: the server; any node of a cluster; with ``master`` the Sentinels.
        tls: whether connections are by TLS.
        database: its number.
        master: the name that Sentinels have for the server; "" without Sentinels.
    """

    addresses: tuple[Address, ...]
    tls: bool = False
    database: int = 0
    master: str = ""


@dataclass(frozen=True, slots=True)
class Login:
    """What a connection takes beside an address. No message repeats one of ``secrets``."""

    tls: bool = False
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def connect(self, address: Address, deadline: float) -> Wire:
        """A connection that is authenticated and at its database by ``deadline``.

        Raises:
            LoginError: the server refused us, or is not who it should be.
            OSError, WireError: it cannot be reached, or does not speak Redis's protocol.
        """
        secrets = {self.password, *self.secrets}
        try:
            sock = open_socket(address, self.context() if self.tls else None, deadline)
        except ssl.SSLCertVerificationError as error:
            raise LoginError(redact(str(error), *secrets)) from None
        try:
            wire = Wire(sock, secrets)
            self._greet(wire, deadline)
        except BaseException:
            sock.close()
            raise
        return wire

    def _greet(self, wire: Wire, deadline: float) -> None:
        commands = []
        if self.password:
            user = [self.username.encode()] if self.username else []
            commands.append(command(b"AUTH", *user, os.fsencode(self.password)))
        if self.database:
            commands.append(command(b"SELECT", b"%d" % self.database))
        for reply in wire.exchange(commands, deadline):
            if isinstance(reply, Refused):
                raise error_of(reply)
            if reply != 1:
                raise WireError("the greeting is not answered with OK")

    def check_certificates(self) -> None:
        """Raise ValueError if the files do not hold what a handshake takes."""
        try:
            self.context()
        except OSError as error:
            raise ValueError(
                f"ca_file, cert_file or key_file does not hold what TLS takes: {error}"
            ) from None

    def context(self) -> ssl.SSLContext:
        """What a handshake takes, read from the files as they are now: certificates are renewed.

        Raises:
            OSError: the files are not what they should be.
        """
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.cert_file:
            # With a password given, OpenSSL does not ask the terminal for one.
            context.load_cert_chain(self.cert_file, self.key_file or None, password="")
        return context


def read_url(url: str) -> Place:
    """What ``url`` says. Raises ValueError that repeats none of what may be a password."""
    query = parse_qsl(url.partition("?")[2], keep_blank_values=True)
    if "@" in url or any(may_be_secret(name) or "user" in name.lower() for name, _ in query):
        raise ValueError(
            "url holds a user or a password, which are not for a profile: give username, and in "
            "password_env the name of the environment variable that has the password"
        )
    scheme, mark, rest = url.partition("://")
    hosts, slash, path = rest.partition("/")
    sentinel = scheme.lower().endswith("+sentinel")
    first, *others = hosts.split(",") if sentinel else [hosts]
    try:
        parts = urlsplit(f"{scheme}{mark}{first}{slash}{path}")
    except ValueError:
        raise ValueError(f"url has no valid host and port; write {FORMS}") from None
    if parts.scheme not in SCHEMES:
        raise ValueError(f"url begins with {parts.scheme + ':'!r}; write {FORMS}")
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"url has no absolute path; write {FORMS}")
        return Place((Address(path=unquote(parts.path)),), database=_database(parts, ""))
    addresses = [_address(host, 26379 if sentinel else 6379) for host in (parts.netloc, *others)]
    master, number = "", parts.path.strip("/")
    if sentinel:
        master, _, number = number.partition("/")
        if not _MASTER.fullmatch(master):
            raise ValueError(f"url does not name the master that Sentinel watches; write {FORMS}")
    tls = parts.scheme.startswith("rediss")
    return Place(tuple(addresses), tls, _database(parts, number), master)


def _address(host: str, usual_port: int) -> Address:
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port
        whole = parts.netloc == host and "," not in host
    except ValueError:
        whole, port = False, None
    if not whole:
        raise ValueError(f"url has no valid host and port; write {FORMS}")
    if not parts.hostname:
        raise ValueError(f"url has no host; write {FORMS}")
    return Address(parts.hostname, port or usual_port)


def _database(parts: SplitResult, number: str) -> int:
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme == "unix":
        number = query.pop("db", "")
    if query or parts.fragment:
        raise ValueError(f"url has more after it than belongs there; write {FORMS}")
    number = number or "0"
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"url has a database that is not a number; write {FORMS}")
    return int(number)


def read_password(variable: str, option: str = "password_env") -> str:
    """The password in an environment variable, none for ``""``. Raises ValueError if it is empty.

    A name that does not look like one may be a password written in the wrong place.
    """
    if not variable:
        return ""
    password = os.environ.get(variable, "")
    if not password:
        which = f"{variable!r}" if _USUAL_NAME.fullmatch(variable) else "a name"
        raise ValueError(
            f"{option} is {which}, and there is no such environment variable, or it is empty; "
            "it takes the name of the variable that has the password"
        )
    return password


def check_files(**files: str) -> None:
    """Raise ValueError for one that cannot be read."""
    for name, path in files.items():
        if path and not (Path(path).is_file() and os.access(path, os.R_OK)):
            raise ValueError(f"{name} is {path!r}, which is no file that can be read")
