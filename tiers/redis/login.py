"""Where a server is, and how a connection to it is made: by redis-py, with what a profile says.

Always true: a password is read from the environment and is in no message, log or ``repr``. A URL
that holds one is refused, and not repeated.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.exceptions import AuthenticationError, AuthorizationError
from redis.retry import Retry

FORMS = "redis://HOST[:PORT][/DATABASE], rediss://... with TLS, or unix:///PATH[?db=DATABASE]"

_USUAL_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


class LoginError(Exception):
    """The server is there and will not have us: no matter of trying again."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host and its port, or the path of a Unix socket."""

    host: str = ""
    port: int = 6379
    path: str = ""

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Login:
    """What a connection takes beside an address."""

    tls: bool = False
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def connect(self, address: Address, timeout_s: float) -> AbstractConnection:
        """A connection that is authenticated and at its database.

        Raises:
            LoginError: the server refused us, or is not who it should be.
            OSError, redis.RedisError: it cannot be reached.
        """
        options: dict[str, Any] = {
            "db": self.database,
            "username": self.username or None,
            "password": self.password or None,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),  # who asks has a deadline, and asks again by himself
            "protocol": 2,  # of which no message comes that was not asked for
        }
        connection: AbstractConnection
        if address.path:
            connection = UnixDomainSocketConnection(path=address.path, **options)
        else:
            options |= {"host": address.host, "port": address.port, "socket_keepalive": True}
            connection = self._secured(options) if self.tls else Connection(**options)
        try:
            connection.connect()
        except (AuthenticationError, AuthorizationError, redis.ResponseError) as error:
            raise LoginError(str(error)) from None
        except redis.ConnectionError as error:
            if isinstance(error.__context__, ssl.SSLCertVerificationError):
                raise LoginError(str(error.__context__)) from None
            raise
        return connection

    def _secured(self, options: dict[str, Any]) -> AbstractConnection:
        return SSLConnection(
            ssl_cert_reqs="required",
            ssl_check_hostname=True,
            ssl_ca_certs=self.ca_file or None,
            ssl_certfile=self.cert_file or None,
            ssl_keyfile=self.key_file or None,
            **options,
        )


def read_url(url: str) -> tuple[Address, bool, int]:
    """The address, whether it is by TLS, and the database. Raises ValueError that repeats none."""
    if "@" in url:
        raise ValueError(
            "url holds a user or a password, which are not for a profile: give username, and in "
            "password_env the name of the environment variable that has the password"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"url has no valid host and port; write {FORMS}") from None
    unix = parts.scheme == "unix"
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise ValueError(f"url begins with {parts.scheme + ':'!r}; write {FORMS}")
    if unix and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError(f"url has no absolute path; write {FORMS}")
    if not unix and not parts.hostname:
        raise ValueError(f"url has no host; write {FORMS}")
    database = _database(parts, unix)
    if unix:
        return Address(path=unquote(parts.path)), False, database
    return Address(parts.hostname or "", port or 6379), parts.scheme == "rediss", database


def _database(parts: SplitResult, unix: bool) -> int:
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    number = query.pop("db", "0") if unix else parts.path.strip("/") or "0"
    if query or parts.fragment:
        raise ValueError(f"url has more after it than belongs there; write {FORMS}")
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"url has a database that is not a number; write {FORMS}")
    return int(number)


def read_password(variable: str) -> str:
    """The password in an environment variable, none for ``""``. Raises ValueError if it is empty.

    A name that does not look like one may be a password written in the wrong place.
    """
    if not variable:
        return ""
    password = os.environ.get(variable, "")
    if not password:
        which = f"{variable!r}" if _USUAL_NAME.fullmatch(variable) else "a name"
        raise ValueError(
            f"password_env is {which}, and there is no such environment variable, or it is empty; "
            "it takes the name of the variable that has the password"
        )
    return password


def check_files(**files: str) -> None:
    """Raise ValueError for one that cannot be read."""
    for name, path in files.items():
        if path and not (Path(path).is_file() and os.access(path, os.R_OK)):
            raise ValueError(f"{name} is {path!r}, which is no file that can be read")
