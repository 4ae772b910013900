"""On a full disk a chain loses its tail before its head, however many calls brought it."""

from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from tests.tiers.test_disk import blocks, held, opened


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("eviction", ["lru", "fifo", "s3fifo"])
def test_a_head_that_others_continue_stays(tmp_path: Path, eviction: str, restarts: bool) -> None:
    """A prompt that all chats begin with: it is in L1 all the time, so nobody asks the disk."""
    head = keys_of("system prompt", 2)
    tier = opened(tmp_path, 10, eviction=eviction)
    tier.store(head, blocks(head))
    for chat in range(20):
        keys = keys_of(f"chat {chat}", 3)
        assert tier.store(keys, blocks(keys), head[-1]) == [True] * 3
        assert tier.contains(head) == [True] * 2
        assert tier.contains(keys) == [True] * 3
        if restarts:
            tier.close()
            tier = opened(tmp_path, 10, eviction=eviction)
    with closing(tier):
        tier._index.check()
        assert held(tier, head) == [True] * 2


def test_of_a_chain_in_pieces_the_last_piece_goes_first(tmp_path: Path) -> None:
    keys, new = keys_of("chain", 9), keys_of("new", 9)
    with closing(opened(tmp_path, 9, eviction="lru")) as tier:
        for at in (0, 3, 6):
            piece = keys[at : at + 3]
            tier.store(piece, blocks(piece), keys[at - 1] if at else None)
        for gone, key in enumerate(new, 1):
            assert tier.store([key], blocks([key])) == [True]
            assert tier.contains(keys) == [True] * (9 - gone) + [False] * gone


def test_what_nobody_could_find_takes_no_ones_place(tmp_path: Path) -> None:
    keys, orphan = keys_of("a", 4), keys_of("orphan", 1)
    with closing(opened(tmp_path, 4)) as tier:
        tier.store(keys, blocks(keys))
        assert tier.store(orphan, blocks(orphan), b"not here") == [False]
        assert tier.contains(keys) == [True] * 4
