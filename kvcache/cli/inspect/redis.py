"""What a Redis or Valkey server, or a cluster of them, holds of ours. Reads only.

Always true: no value is removed, and none is given more time by being looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kvcache.cli.inspect.contents import Contents
from kvcache.cli.inspect.frames import verify as verify_frames
from kvcache.cli.redis_server import RedisServers, connected
from kvcache.sizes import format_size
from kvcache.tier import Tier

_NAME = re.compile(rb"kvcache:1:((?:[0-9a-f]{2})*):((?:[0-9a-f]{2})*)")
_ABOUT_NBYTES = 1 << 16  # of a description
_LARGEST = 512 << 20  # bytes of a value


def contents(options: Mapping[str, object], verify: bool) -> Contents:
    """Count the blocks, and with `verify` read them all and hold them to their checksums.

    Raises ValueError where the server cannot be asked.
    """
    with connected(options) as servers:
        from kvcache.tiers.redis import about_name_of

        found = Contents(str(options["url"]), "redis", {})
        sizes: dict[bytes, int] = {}
        for name, nbytes in servers.sizes(b"kvcache:1:*"):
            if parts := _NAME.fullmatch(name):
                sizes[bytes.fromhex((parts[1] + parts[2]).decode())] = nbytes
        for key, nbytes in sizes.items():
            held = found.of(key)
            held.blocks += 1
            held.nbytes += nbytes
        for namespace in found.namespaces:
            if about := servers.beginning(about_name_of(bytes.fromhex(namespace)), _ABOUT_NBYTES):
                found.describe(namespace, about)
        found.facts["blocks"] = len(sizes)
        if memory := servers.memory():
            found.facts |= {
                "used_nbytes": memory.used_nbytes,
                "limit_nbytes": memory.limit_nbytes,
                "when_full": memory.when_full,
            }
        if verify and sizes:
            largest = max(sizes.values())
            if largest > _LARGEST:
                raise ValueError(
                    f"{options['url']} has a value of {format_size(largest)}; Redis keeps "
                    f"{format_size(_LARGEST)} at most"
                )
            verify_frames(_Values(servers), sizes, largest, found, lambda _: "changed")
        return found


class _Values(Tier):
    """The server as a tier that gives and takes nothing away."""

    def __init__(self, servers: RedisServers) -> None:
        self._servers = servers

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        from kvcache.tiers.redis import name_of

        return [
            self._servers.load(name_of(key), buffer) for key, buffer in zip(keys, into, strict=True)
        ]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Does nothing: what is damaged is removed by the engine that asks for it."""

    def close(self) -> None:
        """The connections are their maker's to close."""
