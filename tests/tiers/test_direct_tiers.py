"""Direct tiers over real tiers: the contract of a tier, and servers that hang or die."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("obstore")
pytest.importorskip("redis")

from kvcache.testing import TierTests, block_of, keys_of
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.framed import frame_nbytes
from kvcache.tiers.object import ObjectTier
from kvcache.tiers.redis import RedisTier
from tests.support import redis_servers
from tests.support.direct_adapter import DirectAdapter, direct_over
from tests.support.direct_under_test import REUSED
from tests.support.disk_tiers import capacity_for
from tests.support.redis_servers import Server
from tests.support.waiting import PATIENCE_S, eventually

SOON_S = 0.05
BLOCK_NBYTES = TierTests.block_nbytes
FRAME_NBYTES = frame_nbytes(BLOCK_NBYTES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def open_disk(path: Path, slots: int = 200) -> DiskTier:
    capacity = capacity_for(slots, FRAME_NBYTES)
    return DiskTier(block_nbytes=FRAME_NBYTES, path=str(path), capacity=capacity)


class TestDirectTiersOverADisk(TierTests):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DirectAdapter]:
        with closing(DirectAdapter(direct_over(open_disk(tmp_path)))) as tier:
            yield tier


class TestDirectTiersOverADiskAndRedis(TierTests):
    @pytest.fixture
    def tier(self, tmp_path: Path, server: Server) -> Iterator[DirectAdapter]:
        server.client().flushall()
        redis = RedisTier(url=server.url, timeout_s=30)
        with closing(DirectAdapter(direct_over(open_disk(tmp_path), redis))) as tier:
            yield tier


class TestDirectTiersOverADiskAndAnObjectStore(TierTests):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DirectAdapter]:
        objects = ObjectTier(url=str(tmp_path / "objects"))
        with closing(DirectAdapter(direct_over(open_disk(tmp_path / "disk"), objects))) as tier:
            yield tier


def test_load_from_a_server_that_continues_late_leaves_the_memory_untouched(
    server: Server, tmp_path: Path
) -> None:
    """The server is stopped, answers after the deadline, and the disk behind it answers in time."""
    server.client().flushall()
    redis = RedisTier(url=server.url, timeout_s=30)
    keys = keys_of("late", 8)
    blocks = [block_of(key, BLOCK_NBYTES) for key in keys]
    with closing(direct_over(redis, open_disk(tmp_path))) as direct:
        assert direct.store(keys, blocks) == [True] * 8
        near, far = direct.tiers
        with server.stopped():
            near.channel.deadline_s = SOON_S
            into = [bytearray(BLOCK_NBYTES) for _ in keys]
            assert direct.load(keys, into) == [True] * 8
            assert into == blocks
            reused = [bytearray([REUSED]) * BLOCK_NBYTES for _ in keys]
            for buffer, pattern in zip(into, reused, strict=True):
                buffer[:] = pattern
        near.channel.workers.close(PATIENCE_S)  # the late calls have ended
        assert all(not thread.is_alive() for thread in near.channel.workers.threads)
        assert into == reused
        assert 1 <= near.stats().errors <= 2  # calls that had begun
        assert far.stats().loaded_blocks == 8


def test_store_to_a_server_that_continues_late_keeps_no_reused_byte(server: Server) -> None:
    server.client().flushall()
    keys = keys_of("late store", 8)
    with closing(direct_over(RedisTier(url=server.url, timeout_s=30))) as direct:
        [tier] = direct.tiers
        assert direct.contains(keys) == [False] * 8  # connects
        buffers = [bytearray(block_of(key, BLOCK_NBYTES)) for key in keys]
        with server.stopped():
            tier.channel.deadline_s = SOON_S
            assert direct.store(keys, buffers) == [False] * 8
            for buffer in buffers:
                buffer[:] = bytes([REUSED]) * BLOCK_NBYTES
        tier.channel.workers.close(PATIENCE_S)
    with closing(direct_over(RedisTier(url=server.url, timeout_s=30))) as direct:
        into = [bytearray(BLOCK_NBYTES) for _ in keys]
        for key, filled, buffer in zip(keys, direct.load(keys, into), into, strict=True):
            assert not filled or buffer == block_of(key, BLOCK_NBYTES)
        assert direct.store(keys, [block_of(key, BLOCK_NBYTES) for key in keys]) == [True] * 8
        assert direct.load(keys, into) == [True] * 8
        assert into == [block_of(key, BLOCK_NBYTES) for key in keys]
        assert direct.stats().lower[0].usage.rejected_blocks == {}


def test_server_that_was_killed_costs_misses_and_is_used_again(server: Server) -> None:
    keys = keys_of("killed", 4)
    blocks = [block_of(key, BLOCK_NBYTES) for key in keys]
    with closing(direct_over(RedisTier(url=server.url, timeout_s=30))) as direct:
        assert direct.store(keys, blocks) == [True] * 4
        server.kill()
        into = [bytearray(BLOCK_NBYTES) for _ in keys]
        assert direct.load(keys, into) == [False] * 4
        assert direct.store(keys, blocks) == [False] * 4
        server.start()
        direct.tiers[0].channel.health.breaker.record_success()
        eventually(lambda: all(direct.store(keys, blocks)), "the tier stores again")
        assert direct.load(keys, into) == [True] * 4
        assert into == blocks
