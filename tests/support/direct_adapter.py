"""Direct tiers behind the interface of a tier, so that the contract suite runs over them."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.lower.direct import DirectTiers
from kvcache.lower.direct_tier import DirectTier
from kvcache.testing import TierTests
from kvcache.tier import Tier, TierUsage
from kvcache.tiers.framed import Framed
from tests.support.stack_under_test import LONG


def direct_over(*tiers: Tier, deadline_s: float = LONG) -> DirectTiers:
    """Open tiers with frames as direct tiers, without a namespace."""
    return DirectTiers(
        [
            DirectTier(
                Framed(tier, block_nbytes=TierTests.block_nbytes),
                name=f"t{number}",
                namespace=b"",
                block_nbytes=TierTests.block_nbytes,
                deadline_s=deadline_s,
                piece_nbytes=4 * TierTests.block_nbytes,
            )
            for number, tier in enumerate(tiers, 1)
        ],
        profile="test",
        block_nbytes=TierTests.block_nbytes,
    )


class DirectAdapter(Tier):
    """A tier that calls direct tiers; ``remove`` calls each tier."""

    def __init__(self, direct: DirectTiers) -> None:
        self.direct = direct

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self.direct.contains(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        blocks = [buffer[: TierTests.block_nbytes] for buffer in into]  # the suite adds guard bytes
        filled = self.direct.load(keys, blocks)
        return [len(block) * done for block, done in zip(blocks, filled, strict=True)]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        return self.direct.store(keys, blocks, parent)

    def remove(self, keys: Sequence[bytes]) -> None:
        for tier in self.direct.tiers:
            tier.channel.tier.remove(keys)

    def usage(self) -> TierUsage:
        """Return the usage of the tier with the fewest declines: one tier must hold a block."""
        usages = [tier.channel.tier.usage() for tier in self.direct.tiers]
        return min(usages, key=lambda usage: sum(usage.declined_blocks.values()))

    def close(self) -> None:
        self.direct.close()
