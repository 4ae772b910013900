"""``usage`` of tiers: bytes and evictions of the disk, rejected blocks of frames, declines."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvcache.stats import usage_of
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


def test_disk_usage_counts_declined_blocks_by_reason_and_logs_each_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a, b = keys_of("a", 2)
    block, large = memoryview(bytes(PAGE)), memoryview(bytes(PAGE + 1))
    offered = [
        (a + bytes(49), block),  # 81 bytes
        (a, large),
        (b"", block),
        (a, memoryview(b"")),
    ]
    with closing(DiskTier(block_nbytes=PAGE, path=str(tmp_path), capacity=capacity_for(1))) as tier:
        caplog.clear()
        for _ in range(2):
            for key, offer in offered:
                assert tier.store([key], [offer]) == [False]
        for _ in range(2):
            assert tier.store([a, b, a], [block] * 3) == [True, False, True]  # of one slot
        assert tier.usage().declined_blocks == {
            "key too long": 2, "block too large": 2, "empty": 4, "no slot": 2,
        }  # fmt: skip
        logged = [record.getMessage().partition(": a ")[2] for record in caplog.records]
    assert [" ".join(message.split()[:4]) for message in logged] == [
        "key has 81 bytes", "block has 4097 bytes", "key or a block", "block got no slot",
    ]  # fmt: skip


def test_framed_usage_adds_the_declines_of_its_inner_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = DiskTier(block_nbytes=FRAME, path=str(tmp_path), capacity=capacity_for(2, FRAME))
    keys = [b"k" * 81, b"k"]
    with closing(Framed(disk, block_nbytes=PAGE)) as tier:
        for _ in range(2):
            blocks = [memoryview(bytes(PAGE)), memoryview(b"")]
            assert tier.store(keys, blocks) == [False, False]
        assert tier.usage().declined_blocks == {"key too long": 2, "empty": 2}
    text = "kvcache: frames: a block is empty; such blocks are declined"
    assert [record.getMessage() for record in caplog.records].count(text) == 1


@pytest.mark.parametrize(
    "declined", [{"full": -1}, {"full": 1.5}, {"full": None}, ["full"], None], ids=repr
)
def test_usage_with_invalid_declines_counts_as_none(declined: Any) -> None:
    tier = DictTier()
    tier.usage = lambda: TierUsage(declined_blocks=declined)  # type: ignore[method-assign]
    assert usage_of(tier) == TierUsage()


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
