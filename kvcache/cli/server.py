"""The Redis or Valkey server that a tier's options name, for commands that look at it.

Always true: looking at a value is no use of it, as far as the server can be asked for that (`CLIENT
NO-TOUCH`, from 7.2; else its LRU sees one).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from os import environ
from typing import TYPE_CHECKING, Any

from kvcache.secrets import redact

if TYPE_CHECKING:
    from kvcache.tiers.redis.sockets import Address

_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Memory:
    """What a server has, of all that it keeps, and what it does when that is full."""

    used_nbytes: int
    limit_nbytes: int  # 0: none
    when_full: str  # its maxmemory-policy


@contextmanager
def connected(options: Mapping[str, object]) -> Iterator[Any]:
    """A client of the server, as the tier's options say; the tier's defaults where they do not.

    Raises ValueError where it cannot be had, and for what the server refuses meanwhile.
    """
    try:
        redis: Any = import_module("redis")
    except ImportError as error:
        raise ValueError(f"redis needs more: pip install 'kvcache[redis]' ({error})") from error
    try:
        with closing(_client(redis, options)) as client:
            yield client
    except redis.RedisError as error:
        raise ValueError(f"{options['url']} cannot be read: {_said(error, options)}") from None


def memory_of(client: Any, options: Mapping[str, object]) -> Memory | None:
    """What one server says; None of a cluster, and where a managed one does not tell."""
    if options.get("cluster"):
        return None
    with suppress(Exception):
        info = client.info("memory")
        used, limit, policy = (info[f] for f in ("used_memory", "maxmemory", "maxmemory_policy"))
        return Memory(int(used), int(limit), str(policy))
    return None


def _said(error: Exception, options: Mapping[str, object]) -> str:
    """An error, which may be in the server's words, for people."""
    variables = (str(options.get(name, "")) for name in ("password_env", "sentinel_password_env"))
    return redact(str(error), *(environ.get(variable, "") for variable in variables))


def _client(redis: Any, options: Mapping[str, object]) -> Any:
    """A connection as the tier's options say; what they do not say is the tier's default."""
    from kvcache.tiers.redis.login import read_password, read_url

    place = read_url(str(options["url"]))
    password = read_password(str(options.get("password_env", "")))
    address = _master(options) if place.master else place.addresses[0]
    given: dict[str, object] = {
        "username": options.get("username") or None,
        "password": password or None,
        "socket_timeout": _WAIT_S,
        "socket_connect_timeout": _WAIT_S,
    }
    if place.tls:
        files = {"ssl_ca_certs": "ca_file", "ssl_certfile": "cert_file", "ssl_keyfile": "key_file"}
        given |= {"ssl": True} | {ours: options.get(its) or None for ours, its in files.items()}
    if options.get("cluster"):
        return redis.RedisCluster(host=address.host, port=address.port, **given)
    where = (
        {"unix_socket_path": address.path}
        if address.path
        else {"host": address.host, "port": address.port}
    )
    client = redis.Redis(**where, **given, db=place.database, single_connection_client=True)
    with suppress(redis.ResponseError):
        client.execute_command("CLIENT", "NO-TOUCH", "ON")
    return client


def _master(options: Mapping[str, object]) -> Address:
    """Where the master is that the options' Sentinels watch. Raises ValueError if none says."""
    from kvcache.tiers.redis.login import Login, LoginError, read_password, read_url
    from kvcache.tiers.redis.sentinel import Watched

    def option(name: str) -> str:
        return str(options.get(name, ""))

    place = read_url(option("url"))
    password = read_password(option("sentinel_password_env"), "sentinel_password_env")
    ca_file, cert_file, key_file = map(option, ("ca_file", "cert_file", "key_file"))
    username = option("sentinel_username")
    asking = Login(place.tls, 0, username, password, ca_file, cert_file, key_file)
    watched = Watched(place.addresses, place.master, asking, asking, 1)
    try:
        return watched.find(time.monotonic() + _WAIT_S)
    except (LoginError, OSError) as error:
        raise ValueError(f"{option('url')} cannot be read: {error}") from None
