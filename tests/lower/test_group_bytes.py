"""The bytes that a hit on several groups moves: those of the blocks that it needs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvcache import Stack
from kvcache.lower.tier import LowerTier
from kvcache.resume import Needs
from kvcache.sizes import Size
from kvcache.slab import PAGE
from kvcache.testing import block_of
from kvcache.tier import Tier
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.dram import DramTier
from tests.support.disk_tiers import capacity_for
from tests.support.failing_parts import FaultyTier
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest, check_resume, put_branches
from tests.support.stack_under_test import LONG

BLOCKS = 40
MOST_OF_NEEDED = 1.05
MODELS = {
    "window and full": [Needs("window", 5 * BLOCK_TOKENS)],
    "state and full": [Needs("state"), Needs("state")],
}


class CountingDisk(DiskTier):
    """A disk tier that counts the bytes of its reads."""

    read_nbytes = 0

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = super().load(keys, into)
        self.read_nbytes += sum(written)
        return written


class RecordingTier(FaultyTier):
    """A tier in memory that counts the bytes of its reads."""

    read_nbytes = 0

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = super().load(keys, into)
        self.read_nbytes += sum(written)
        return written


def open_disk(path: Path) -> CountingDisk:
    return CountingDisk(block_nbytes=PAGE, path=str(path), capacity=capacity_for(9 * BLOCKS))


def open_stack(tier: Tier) -> Stack:
    front = DramTier(block_nbytes=PAGE, capacity=Size(8 * BLOCKS * PAGE))
    front.slab.wait_populated()
    lower = LowerTier(tier, name="l2", front=front, namespace=b"n" * 32, deadline_s=LONG)
    lower.write_behind.queue_blocks = 4 * BLOCKS
    return Stack(front, [lower], profile="test")


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_hit_reads_the_bytes_that_it_needs(
    tmp_path: Path, kind: str, model: str, parts: int
) -> None:
    memory = RecordingTier()
    open_tier: Callable[[], CountingDisk | RecordingTier] = (
        (lambda: open_disk(tmp_path)) if kind == "disk" else (lambda: memory)
    )
    request = GroupedRequest(*MODELS[model], parts=parts)
    tier = open_tier()
    with open_stack(tier) as stack:
        for first in range(0, BLOCKS, 8):
            put_branches(stack, *request.branches(first, first + 8))
            assert stack.flush(LONG)
    tier = open_tier()
    with open_stack(tier) as stack:
        top = BLOCKS * BLOCK_TOKENS
        assert (future := stack.prefetch_resume(request.groups, top, BLOCK_TOKENS)) is not None
        assert future.result(LONG).blocks == BLOCKS * parts
        needed_nbytes = len(request.needed(0, top)) * PAGE
        assert needed_nbytes <= tier.read_nbytes <= MOST_OF_NEEDED * needed_nbytes
        assert stack.stats().tiers[0].used_blocks == len(request.needed(0, top))
        # The engine copies the slots of the lease, and nothing else.
        own = 30 * BLOCK_TOKENS
        with stack.fetch_resume(request.groups, own, top, BLOCK_TOKENS).lease as lease:
            assert list(lease.keys) == request.needed(own, top)
            assert [bytes(view) for view in lease.views] == [
                block_of(key, PAGE) for key in lease.keys
            ]
        assert check_resume(stack, request, 0, top) == top
