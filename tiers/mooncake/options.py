"""Checks the options of a tier in a Mooncake pool.

Invariant: no message repeats a value that may have a password.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from kvcache.secrets import with_value

P2P: Final = "P2PHANDSHAKE"
"""The metadata option of pools in which the clients ask each other."""

_SCHEMES: Final = ("http", "https", "etcd", "redis")
_HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\]")

Address = tuple[str, int]
"""A host and its port."""


def parse_address(option: str, text: str) -> Address:
    """Return the host and the port of an option.

    Raises:
        ValueError: it has another form.
    """
    found = _HOST_AND_PORT.fullmatch(text)
    if not found or not 0 < int(found[3]) < 1 << 16:
        raise ValueError(
            f"{with_value(option, text)} is no host with a port; write cache.example:50051"
        )
    return found[1] or found[2], int(found[3])


def metadata_address(metadata: str) -> Address | None:
    """Return the host and port of the metadata server; ``None`` for pools without one.

    Raises:
        ValueError: ``metadata`` has no valid form, or may have a password.
    """
    if metadata == P2P:
        return None
    if "@" in metadata:
        raise ValueError("metadata contains a user or a password; Mooncake reads MC_REDIS_PASSWORD")
    try:
        parts = urlsplit(metadata)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in _SCHEMES:
        raise ValueError(
            f"{with_value('metadata', metadata)} has no valid form; "
            "write P2PHANDSHAKE, http://HOST:PORT/metadata, etcd://HOST:PORT or redis://HOST:PORT"
        )
    return host, port


def check_hostname(hostname: str) -> None:
    """Raise ValueError if ``hostname`` is no name or address without a port."""
    if not _HOST_NAME.fullmatch(hostname):
        raise ValueError(
            f"{with_value('hostname', hostname)} is no name or address of this host; "
            "write it without a port, or leave it empty to use the address on the way to the master"
        )
