"""Offers blocks to a lower tier: write-behind and direct tiers store through this function alone.

Invariant: the tier is offered only the blocks that it reports to lack, or (``lookup =
"load"``) those that this process has not stored or loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from kvcache.guards.calls import TierError
from kvcache.keys import branches_of
from kvcache.lower.channel import Channel


class Offered(NamedTuple):
    """The answer to an offer, for each block."""

    known: list[bool]  # the tier held it before
    held: list[bool]  # the tier holds it now

    @property
    def known_blocks(self) -> int:
        """How many blocks the tier held before."""
        return sum(self.known)

    @property
    def stored_blocks(self) -> int:
        """How many blocks the tier stored."""
        return sum(self.held) - sum(self.known)


def offer(
    channel: Channel,
    namespace: bytes,
    keys: Sequence[bytes],
    parents: Sequence[bytes | None],
    blocks: Sequence[memoryview],
) -> Offered:
    """Store the blocks that the tier lacks.

    Args:
        channel: calls the tier.
        namespace: of the blocks.
        keys: of the blocks, in order.
        parents: the key that each block continues.
        blocks: the bytes of each block.

    Raises:
        TierError: when the tier fails.
    """
    with suppress(TierError):  # finish_clear() has logged it; it costs no block
        channel.tier_namespace.forget()
    known = channel.known(namespace, keys)
    held = list(known)
    lacking = [at for at, is_known in enumerate(known) if not is_known]
    if lacking:
        branches = branches_of([keys[at] for at in lacking], [parents[at] for at in lacking])
        stored = channel.store(namespace, branches, [blocks[at] for at in lacking])
        for at, is_stored in zip(lacking, stored, strict=True):
            held[at] = is_stored
    return Offered(known, held)
