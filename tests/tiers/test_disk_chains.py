"""DiskTier when full: a chain stored in several calls loses its tail before its head."""

from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from tests.support.disk_tiers import blocks_of, load_hits, open_disk


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("eviction", ["lru", "fifo", "s3fifo"])
def test_disk_when_full_keeps_a_head_that_other_chains_continue(
    tmp_path: Path, eviction: str, restarts: bool
) -> None:
    """A system prompt is always in L1, so the disk is never asked for it."""
    head = keys_of("system prompt", 2)
    tier = open_disk(tmp_path, 10, eviction=eviction)
    tier.store(head, blocks_of(head))
    for chat in range(20):
        keys = keys_of(f"chat {chat}", 3)
        assert tier.store(keys, blocks_of(keys), head[-1]) == [True] * 3
        assert tier.contains(head) == [True] * 2
        assert tier.contains(keys) == [True] * 3
        if restarts:
            tier.close()
            tier = open_disk(tmp_path, 10, eviction=eviction)
    with closing(tier):
        tier.index.check()
        assert load_hits(tier, head) == [True] * 2


def test_disk_when_full_evicts_the_last_stored_piece_of_a_chain_first(tmp_path: Path) -> None:
    keys, new = keys_of("chain", 9), keys_of("new", 9)
    with closing(open_disk(tmp_path, 9, eviction="lru")) as tier:
        for at in (0, 3, 6):
            piece = keys[at : at + 3]
            tier.store(piece, blocks_of(piece), keys[at - 1] if at else None)
        for evicted, key in enumerate(new, 1):
            assert tier.store([key], blocks_of([key])) == [True]
            assert tier.contains(keys) == [True] * (9 - evicted) + [False] * evicted


def test_disk_store_when_full_with_unknown_parent_declines_the_block(tmp_path: Path) -> None:
    keys, orphan = keys_of("a", 4), keys_of("orphan", 1)
    with closing(open_disk(tmp_path, 4)) as tier:
        tier.store(keys, blocks_of(keys))
        assert tier.store(orphan, blocks_of(orphan), b"not stored") == [False]
        assert tier.contains(keys) == [True] * 4
