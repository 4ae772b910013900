"""What a Redis or Valkey server, or a cluster of them, holds of ours. Reads only.

Always true: no value is removed, and none is given more time by being looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from kvcache.cli.inspect.contents import Contents
from kvcache.cli.inspect.frames import verify as verify_frames
from kvcache.cli.server import connected, memory_of
from kvcache.tier import Tier

_NAME = re.compile(rb"kvcache:1:((?:[0-9a-f]{2})*):((?:[0-9a-f]{2})*)")
_AT_ONCE = 500
_ABOUT_NBYTES = 1 << 16  # of a description

T = TypeVar("T")


def contents(options: Mapping[str, object], verify: bool) -> Contents:
    """Count the blocks, and with `verify` read them all and hold them to their checksums.

    Raises ValueError where the server cannot be asked.
    """
    with connected(options) as client:
        return _counted(client, options, verify)


def _counted(client: Any, options: Mapping[str, object], verify: bool) -> Contents:
    from kvcache.tiers.redis import about_name_of

    found = Contents(str(options["url"]), "redis", {})
    sizes: dict[bytes, int] = {}
    for names in _batches(client.scan_iter(match=b"kvcache:1:*", count=_AT_ONCE)):
        asked = client.pipeline(transaction=False)
        for name in names:
            asked.strlen(name)
        for name, nbytes in zip(names, asked.execute(raise_on_error=False), strict=True):
            if (parts := _NAME.fullmatch(name)) and isinstance(nbytes, int) and nbytes:
                sizes[bytes.fromhex((parts[1] + parts[2]).decode())] = nbytes
    for key, nbytes in sizes.items():
        held = found.of(key)
        held.blocks += 1
        held.nbytes += nbytes
    for names in _batches(iter(found.namespaces)):
        asked = client.pipeline(transaction=False)
        for name in names:
            asked.getrange(about_name_of(bytes.fromhex(name)), 0, _ABOUT_NBYTES)
        for name, about in zip(names, asked.execute(raise_on_error=False), strict=True):
            if isinstance(about, bytes):
                found.describe(name, about)
    found.facts["blocks"] = len(sizes)
    if memory := memory_of(client, options):
        found.facts |= {
            "used_nbytes": memory.used_nbytes,
            "limit_nbytes": memory.limit_nbytes,
            "when_full": memory.when_full,
        }
    if verify and sizes:
        verify_frames(_Values(client), sizes, max(sizes.values()), found, lambda _: "changed")
    return found


def _batches(names: Iterator[T]) -> Iterator[list[T]]:
    while batch := list(islice(names, _AT_ONCE)):
        yield list(dict.fromkeys(batch))  # a scan may give a name twice


class _Values(Tier):
    """The server as a tier that gives and takes nothing away."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        from kvcache.tiers.redis import name_of

        written = []
        for key, buffer in zip(keys, into, strict=True):
            value = self._client.get(name_of(key)) or b""
            fits = len(value) <= len(buffer)
            buffer[: len(value) if fits else 0] = value if fits else b""
            written.append(len(value) if fits else 0)
        return written

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], after: bytes | None = None
    ) -> list[bool]:
        return [False] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Does nothing: what is damaged is removed by the engine that asks for it."""

    def close(self) -> None:
        """The client is its maker's to close."""
