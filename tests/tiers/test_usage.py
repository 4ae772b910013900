"""``usage`` of tiers: bytes and evictions of the disk, rejected blocks of frames."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from kvcache.testing import block_of, keys_of
from kvcache.tier import TierUsage
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.framed import PAGE, Framed, frame_nbytes
from tests.support.disk_tiers import capacity_for
from tests.support.frames import DictTier
from tests.support.wrong_results import EXCEPTIONS

FRAME = frame_nbytes(PAGE)


def test_framed_usage_over_disk_counts_bytes_evictions_and_rejections(tmp_path: Path) -> None:
    room = capacity_for(4, FRAME)
    disk = DiskTier(block_nbytes=FRAME, path=str(tmp_path), capacity=room)
    with closing(Framed(disk, block_nbytes=PAGE)) as tier:
        assert tier.usage() == TierUsage(0, 4 * FRAME, 0)
        keys = keys_of("a", 5)
        for key in keys:
            assert tier.store([key], [memoryview(block_of(key, PAGE))]) == [True]
        assert tier.usage() == TierUsage(4 * FRAME, 4 * FRAME, 1)
        blocks = os.open(tmp_path / "blocks", os.O_WRONLY)
        os.pwrite(blocks, bytes(FRAME), 2 * FRAME)
        os.close(blocks)
        into = [memoryview(bytearray(PAGE)) for _ in keys]
        assert sum(map(bool, tier.load(keys, into))) == 3
        assert tier.usage() == TierUsage(3 * FRAME, 4 * FRAME, 1, {"magic": 1})
    assert tier.usage().limit_nbytes == 4 * FRAME  # also after close


def test_framed_usage_over_framed_adds_up_rejections() -> None:
    inner = DictTier()
    tier = Framed(Framed(inner, block_nbytes=FRAME), block_nbytes=PAGE)
    [key] = keys_of("a", 1)
    tier.store([key], [memoryview(block_of(key, PAGE))])
    inner.values[key] = bytes(len(inner.values[key]))
    assert tier.load([key], [memoryview(bytearray(PAGE))]) == [0]
    assert tier.usage() == TierUsage(rejected_blocks={"magic": 1})


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_framed_when_inner_usage_and_remove_raise_still_loads(name: str) -> None:
    def fail(*_: object) -> NoReturn:
        error = EXCEPTIONS[name]()
        raise error

    def work() -> None:
        inner = DictTier()
        tier = Framed(inner, block_nbytes=PAGE)
        keys = keys_of("a", 2)
        tier.store(keys, [memoryview(block_of(key, PAGE)) for key in keys])
        inner.values[keys[0]] = bytes(len(inner.values[keys[0]]))
        inner.remove = inner.usage = fail  # type: ignore[assignment,method-assign]
        answers.append(tier.load(keys, [memoryview(bytearray(PAGE)) for _ in keys]))
        answers.append(tier.usage())

    answers: list[object] = []
    thread = threading.Thread(target=work)  # as the stack calls a tier
    thread.start()
    thread.join()
    assert answers == [[0, PAGE], TierUsage(rejected_blocks={"magic": 1})]
