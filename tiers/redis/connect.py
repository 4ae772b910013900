"""Parses a server's URL and options, and makes authenticated connections.

Invariants:

* A password is read from the environment, and is in no message, log or ``repr``. A URL with a
  password is refused, and not repeated.
* A connection is authenticated by the deadline of the call that needs it, or the call fails.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvcache.secrets import may_be_secret, redact
from kvcache.tiers.redis.resp import MAX_CLIENTS, ErrorReply, ProtocolError, RespConnection, command
from kvcache.tiers.redis.sockets import Address, open_socket

FORMS = (
    "redis://HOST[:PORT][/DATABASE], redis+sentinel://HOST[:PORT][,HOST...]/MASTER[/DATABASE], "
    "rediss... with TLS, or unix:///PATH[?db=DATABASE]"
)

SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "unix")

_MASTER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TEMPORARY_ERRORS = {MAX_CLIENTS, "LOADING", "BUSY", "MASTERDOWN"}
"""Codes with which a server rejects every connection for a while."""


class ConnectionRejectedError(Exception):
    """The server rejects the connection, and would reject it again."""


def error_from(reply: ErrorReply) -> ProtocolError | ConnectionRejectedError:
    """Return the exception for an error during login."""
    temporary = reply.code in _TEMPORARY_ERRORS
    return (ProtocolError if temporary else ConnectionRejectedError)(reply.text)


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """The parts of a URL.

    Attributes:
        addresses: the server, or any node of a cluster; with ``master``, the Sentinels.
        tls: whether connections use TLS.
        database: the number of the database.
        master: the name of the master that the Sentinels watch; "" without Sentinels.
    """

    addresses: tuple[Address, ...]
    tls: bool = False
    database: int = 0
    master: str = ""


@dataclass(frozen=True, slots=True)
class Connector:
    """Makes connections with the same options. No message contains one of ``secrets``."""

    tls: bool = False
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def connect(self, address: Address, deadline: float) -> RespConnection:
        """Return a connection that is authenticated, with the database selected.

        Raises:
            ConnectionRejectedError: the server rejected the login, or its certificate is invalid.
            OSError: the server cannot be reached by ``deadline``.
            ProtocolError: it does not speak Redis's protocol.
        """
        secrets = {self.password, *self.secrets}
        try:
            sock = open_socket(address, self.tls_context() if self.tls else None, deadline)
        except ssl.SSLCertVerificationError as error:
            raise ConnectionRejectedError(redact(str(error), *secrets)) from None
        try:
            connection = RespConnection(sock, secrets)
            self._log_in(connection, deadline)
        except BaseException:
            sock.close()
            raise
        return connection

    def _log_in(self, connection: RespConnection, deadline: float) -> None:
        commands = []
        if self.password:
            user = [self.username.encode()] if self.username else []
            commands.append(command(b"AUTH", *user, os.fsencode(self.password)))
        if self.database:
            commands.append(command(b"SELECT", b"%d" % self.database))
        for reply in connection.exchange(commands, deadline):
            if isinstance(reply, ErrorReply):
                raise error_from(reply)
            if reply != 1:
                raise ProtocolError("the server did not answer the login with OK")

    def check_certificates(self) -> None:
        """Raise ValueError if the files cannot be used for TLS."""
        try:
            self.tls_context()
        except OSError as error:
            raise ValueError(
                f"ca_file, cert_file or key_file cannot be used for TLS: {error}"
            ) from None

    def tls_context(self) -> ssl.SSLContext:
        """Return the TLS context; reads the files each time, since certificates are renewed.

        Raises:
            OSError: a file cannot be read or used.
        """
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.cert_file:
            # With a password given, OpenSSL does not ask the terminal for one.
            context.load_cert_chain(self.cert_file, self.key_file or None, password="")
        return context


def parse_url(url: str) -> ServerUrl:
    """Return the parts of ``url``.

    Raises:
        ValueError: ``url`` is invalid; the message contains nothing that may be a password.
    """
    query = parse_qsl(url.partition("?")[2], keep_blank_values=True)
    if "@" in url or any(may_be_secret(name) or "user" in name.lower() for name, _ in query):
        raise ValueError(
            "url contains a user or a password; set username, and set password_env to the name of "
            "the environment variable that has the password"
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
        return ServerUrl((Address(path=unquote(parts.path)),), database=_parse_database(parts, ""))
    addresses = [_parse_host(host, 26379 if sentinel else 6379) for host in (parts.netloc, *others)]
    master, number = "", parts.path.strip("/")
    if sentinel:
        master, _, number = number.partition("/")
        if not _MASTER_NAME.fullmatch(master):
            raise ValueError(f"url does not name the master that Sentinel watches; write {FORMS}")
    tls = parts.scheme.startswith("rediss")
    return ServerUrl(tuple(addresses), tls, _parse_database(parts, number), master)


def _parse_host(host: str, default_port: int) -> Address:
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port
        valid = parts.netloc == host and "," not in host
    except ValueError:
        valid, port = False, None
    if not valid:
        raise ValueError(f"url has no valid host and port; write {FORMS}")
    if not parts.hostname:
        raise ValueError(f"url has no host; write {FORMS}")
    return Address(parts.hostname, port or default_port)


def _parse_database(parts: SplitResult, number: str) -> int:
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme == "unix":
        number = query.pop("db", "")
    if query or parts.fragment:
        raise ValueError(f"url has unknown parameters; write {FORMS}")
    number = number or "0"
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"url has a database that is not a number; write {FORMS}")
    return int(number)
