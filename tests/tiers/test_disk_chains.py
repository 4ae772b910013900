"""DiskTier when full: a chain stored in several calls loses its tail before its head."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE
from kvcache.tiers.disk.record_file import (
    NEWEST_GENERATION,
    RECORD_NBYTES,
    Geometry,
    Record,
    RecordFile,
    read_record,
)
from tests.support.disk_tiers import RECORD_USED_NBYTES, blocks_of, load_hits, open_disk


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


def test_disk_keeps_side_blocks_with_long_keys_after_a_restart(tmp_path: Path) -> None:
    chain, sides = keys_of("chain", 3, 64), keys_of("side", 3, 80)
    too_long = keys_of("too long", 1, 81)
    parts = keys_of("part", 1, 66)
    with closing(open_disk(tmp_path)) as tier:
        keys = [*chain, *sides, *parts, *too_long]
        branches = [(chain, None), *[([side], chain[at]) for at, side in enumerate(sides)]]
        branches += [(parts, sides[0]), (too_long, chain[0])]
        assert tier.store_branches(branches, blocks_of(keys)) == [True] * 7 + [False]
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [True] * 7 + [False]
        new = keys_of("new", 3)
        assert tier.store(new, blocks_of(new)) == [True] * 3
        # Each block is evicted after those that continue it.
        assert tier.contains(chain) == [True] * 3
        assert sum(tier.contains([*sides, *parts])) == 2
        assert tier.contains(parts) == [False]


def test_disk_ignores_a_record_with_a_damaged_rest_of_a_key(tmp_path: Path) -> None:
    keys = keys_of("long", 2, 70)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    records = tmp_path / "records"
    data = bytearray(records.read_bytes())
    data[data.index(keys[0][64:])] ^= 1
    records.write_bytes(data)
    with closing(open_disk(tmp_path)) as tier:
        assert load_hits(tier, keys) == [False, True]


def test_disk_record_of_a_short_key_is_as_before(tmp_path: Path) -> None:
    keys = keys_of("short", 2, 64)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
    record = (tmp_path / "records").read_bytes()[PAGE : PAGE + RECORD_NBYTES]
    assert record[RECORD_USED_NBYTES:] == bytes(RECORD_NBYTES - RECORD_USED_NBYTES)
    assert any(record[RECORD_USED_NBYTES - 4 : RECORD_USED_NBYTES])


def change_records(path: Path, change: Callable[[Record], Record], slots: int = 8) -> None:
    """Replace the record of each block of a closed tier, with a CRC that fits."""
    fd, blocks_fd = (os.open(path / name, os.O_RDWR) for name in ("records", "blocks"))
    file = RecordFile(fd, PAGE, slots, blocks_fd)
    for slot in range(slots):
        if (record := read_record(fd, Geometry(PAGE, slots), slot)) is not None:
            file.write(change(record))
    os.close(fd)
    os.close(blocks_fd)


@pytest.mark.parametrize("eviction", ["gittins", "lru", "fifo", "arc", "s3fifo"])
@pytest.mark.parametrize("cycle", [1, 2, 3])
def test_disk_keeps_and_evicts_blocks_of_a_chain_that_continues_itself(
    tmp_path: Path, cycle: int, eviction: str
) -> None:
    keys, new = keys_of("chain", 4, 64), keys_of("new", 20, 64)
    with closing(open_disk(tmp_path)) as tier:
        assert all(tier.store(keys, blocks_of(keys)))
    last = keys[cycle - 1]
    change_records(tmp_path, lambda each: each._replace(parent=each.parent or last))
    with closing(open_disk(tmp_path, eviction=eviction)) as tier:
        tier.index.check()
        assert load_hits(tier, keys) == [True] * 4
        for key in new:
            assert tier.store([key], blocks_of([key])) == [True]
        tier.index.check()


@pytest.mark.parametrize("generation", [NEWEST_GENERATION, NEWEST_GENERATION + 1, 2**64 - 1])
def test_disk_stores_blocks_after_a_record_of_any_generation(
    tmp_path: Path, generation: int
) -> None:
    keys, new = keys_of("a", 2, 64), keys_of("new", 3, 64)
    with closing(open_disk(tmp_path)) as tier:
        assert all(tier.store(keys, blocks_of(keys)))
    change_records(tmp_path, lambda each: each._replace(generation=generation))
    with closing(open_disk(tmp_path)) as tier:
        assert tier.contains(keys) == [generation == NEWEST_GENERATION] * 2
        assert all(tier.store(new, blocks_of(new)))
        tier.index.check()
        assert load_hits(tier, new) == [True] * 3
