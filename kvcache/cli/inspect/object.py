"""Read the blocks of kvcache in an object store. Writes and removes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from kvcache.cli.inspect.contents import TierContents
from kvcache.cli.inspect.frames import ReadOnlyTier
from kvcache.cli.inspect.frames import verify as verify_frames
from kvcache.cli.object_store import open_store
from kvcache.sizes import format_size

_PART = r"((?:[0-9a-f]{2})+|-)"
_NAME = re.compile(rf"kvcache/1/block/{_PART}/{_PART}/{_PART}")
_BLOCKS = "kvcache/1/block"
_DESCRIPTION_NBYTES = 1 << 16
_LARGEST_OBJECT_NBYTES = 1 << 30


def read_contents(options: Mapping[str, object], verify: bool) -> TierContents:
    """Count the blocks; with ``verify`` also read them, and verify their checksums.

    Raises:
        ValueError: the store cannot be read.
    """
    store = open_store(options)
    from kvcache.tiers.object.names import block_name, description_name

    contents = TierContents(str(options["url"]), "object", {})
    sizes: dict[bytes, int] = {}
    oldest = newest = None
    for each in store.list(_BLOCKS):
        if parts := _NAME.fullmatch(each.name):
            namespace, _, key = (part.replace("-", "") for part in parts.groups())
            sizes[bytes.fromhex(namespace + key)] = each.nbytes
            oldest = min(oldest or each.modified, each.modified)
            newest = max(newest or each.modified, each.modified)
    for key, nbytes in sizes.items():
        contents.namespace_of(key).add_block(nbytes)
    for name in contents.namespaces:
        if description := store.read(description_name(bytes.fromhex(name)), _DESCRIPTION_NBYTES):
            contents.describe(name, description)
    contents.facts["blocks"] = len(sizes)
    if oldest and newest:
        contents.facts |= {"oldest": _shown(oldest), "newest": _shown(newest)}
    if verify and sizes:
        largest = max(sizes.values())
        if largest > _LARGEST_OBJECT_NBYTES:
            raise ValueError(
                f"{options['url']} has an object of {format_size(largest)}; "
                f"a block has at most {format_size(_LARGEST_OBJECT_NBYTES)} here"
            )

        def load(key: bytes, into: memoryview) -> int:
            value = store.read(block_name(key), into.nbytes)
            into[: len(value)] = value
            return len(value)

        verify_frames(ReadOnlyTier(load), sizes, largest, contents, lambda _: "changed")
    return contents


def _shown(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
