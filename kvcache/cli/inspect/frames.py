"""Verify the frames of a tier's blocks against their checksums."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence

from kvcache.cli.inspect.contents import TierContents
from kvcache.cli.progress import ProgressBar
from kvcache.sizes import format_size
from kvcache.tier import Tier


class ReadOnlyTier(Tier):
    """A tier that only loads.

    Args:
        load: writes the value of a key into a buffer, and returns its number of bytes; 0 if it is
            missing.
    """

    def __init__(self, load: Callable[[bytes, memoryview], int]) -> None:
        self._load = load

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        return [self._load(key, buffer) for key, buffer in zip(keys, into, strict=True)]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return [False] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Do nothing: an engine that reads a damaged block removes it."""

    def close(self) -> None:
        """Do nothing: the caller closes what `load` reads from."""


def verify(
    tier: Tier,
    keys: Collection[bytes],
    largest_nbytes: int,
    contents: TierContents,
    missing_reason: Callable[[bytes], str],
) -> None:
    """Read every block through its frame, and count intact and rejected blocks in ``contents``.

    Args:
        tier: must ignore ``remove``: reading a frame that does not verify calls it.
        keys: of the blocks to read.
        largest_nbytes: the size of the largest possible frame.
        contents: has a namespace for each key.
        missing_reason: returns one word for a block that the tier did not return.

    Raises:
        ValueError: ``largest_nbytes`` is too small for a frame.
    """
    from kvcache.tiers.framed import HEADER_NBYTES, Framed

    if (room := largest_nbytes - HEADER_NBYTES) < 1:
        raise ValueError(
            f"{contents.place} has values of at most {format_size(largest_nbytes)}; that is no "
            "room for a frame, so there are no checksums to verify"
        )
    contents.verified = True
    framed, buffer = Framed(tier, block_nbytes=room), memoryview(bytearray(room))
    with ProgressBar(sys.stderr, len(keys)) as bar:
        for key in keys:
            found = contents.namespace_of(key)
            rejected = framed.stats().rejected
            if framed.load([key], [buffer])[0]:
                found.intact += 1
            else:
                found.rejected += (framed.stats().rejected - rejected) or {missing_reason(key): 1}
            bar.add(1)
