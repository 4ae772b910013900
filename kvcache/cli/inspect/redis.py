"""Read the blocks of kvcache in a Redis or Valkey server, or a cluster of them.

Invariant: no value is removed, and reading one does not extend its life.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvcache.cli.inspect.contents import TierContents
from kvcache.cli.inspect.frames import ReadOnlyTier
from kvcache.cli.inspect.frames import verify as verify_frames
from kvcache.cli.redis_server import connected
from kvcache.sizes import format_size

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
            from kvcache.tiers.redis import block_name

            tier = ReadOnlyTier(lambda key, into: servers.load(block_name(key), into))
            verify_frames(tier, sizes, largest, contents, lambda _: "changed")
        return contents
