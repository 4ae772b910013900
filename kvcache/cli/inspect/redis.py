"""Read the blocks of kvcache in a Redis or Valkey server, or a cluster of them.

Always true: no value is removed, and reading one does not extend its life.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kvcache.cli.inspect.contents import TierContents
from kvcache.cli.inspect.frames import verify as verify_frames
from kvcache.cli.redis_server import RedisServers, connected
from kvcache.sizes import format_size
from kvcache.tier import Tier

_NAME = re.compile(rb"kvcache:1:((?:[0-9a-f]{2})*):((?:[0-9a-f]{2})*)")
_DESCRIPTION_NBYTES = 1 << 16
_LARGEST_VALUE_NBYTES = 512 << 20


def read_contents(options: Mapping[str, object], verify: bool) -> TierContents:
    """Count the blocks; with ``verify`` also read them, and verify their checksums.

    Raises:
        ValueError: the server cannot be reached, or is not a Redis server.
    """
    with connected(options) as servers:
        from kvcache.tiers.redis import description_name

        contents = TierContents(str(options["url"]), "redis", {})
        sizes: dict[bytes, int] = {}
        for name, nbytes in servers.sizes(b"kvcache:1:*"):
            if parts := _NAME.fullmatch(name):
                sizes[bytes.fromhex((parts[1] + parts[2]).decode())] = nbytes
        for key, nbytes in sizes.items():
            contents.namespace_of(key).add_block(nbytes)
        for namespace in contents.namespaces:
            name = description_name(bytes.fromhex(namespace))
            if description := servers.beginning(name, _DESCRIPTION_NBYTES):
                contents.describe(namespace, description)
        contents.facts["blocks"] = len(sizes)
        if memory := servers.memory():
            contents.facts |= {
                "used_nbytes": memory.used_nbytes,
                "limit_nbytes": memory.limit_nbytes,
                "when_full": memory.when_full,
            }
        if verify and sizes:
            largest = max(sizes.values())
            if largest > _LARGEST_VALUE_NBYTES:
                raise ValueError(
                    f"{options['url']} has a value of {format_size(largest)}; values of Redis "
                    f"have at most {format_size(_LARGEST_VALUE_NBYTES)}"
                )
            tier = _ReadOnlyTier(servers)
            verify_frames(tier, sizes, largest, contents, lambda _: "changed")
        return contents


class _ReadOnlyTier(Tier):
    """The servers as a tier that stores and removes nothing."""

    def __init__(self, servers: RedisServers) -> None:
        self._servers = servers

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        from kvcache.tiers.redis import block_name

        return [
            self._servers.load(block_name(key), buffer)
            for key, buffer in zip(keys, into, strict=True)
        ]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Do nothing: an engine that reads a damaged block removes it."""

    def close(self) -> None:
        """Do nothing: `connected` closes the connections."""
