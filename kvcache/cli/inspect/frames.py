"""Blocks held to their checksums, in whatever tier they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

from kvcache.cli.inspect.contents import Contents
from kvcache.cli.progress import Bar
from kvcache.sizes import format_size
from kvcache.tier import Tier


def verify(
    tier: Tier,
    keys: Collection[bytes],
    largest: int,
    found: Contents,
    why: Callable[[bytes], str],
) -> None:
    """Read every block through the frame that was put around it, and count what comes of it.

    `tier` must not do what `remove` asks for: frames that do not verify are removed by who loads
    them. `largest` are the bytes of the largest frame there can be. `why` says in a word why a
    block did not come at all.
    """
    from kvcache.tiers.framed import HEADER_NBYTES, Framed

    if (room := largest - HEADER_NBYTES) < 1:
        raise ValueError(
            f"{found.where} keeps at most {format_size(largest)} of a block; that has no room for "
            "a frame, so there is nothing to verify blocks by"
        )
    found.verified = True
    framed, buffer = Framed(tier, block_nbytes=room), memoryview(bytearray(room))
    with Bar(sys.stderr, len(keys)) as bar:
        for key in keys:
            held = found.of(key)
            before = framed.stats().rejected
            if framed.load([key], [buffer])[0]:
                held.intact += 1
            else:
                held.rejected += (framed.stats().rejected - before) or {why(key): 1}
            bar.add(1)
