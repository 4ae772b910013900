"""Every shipped tier that stores blocks, each on its real server, for tests of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from kvcache.tier import Tier
from tests.support.disk_tiers import capacity_for

DISK_SLOTS = 200
TIMEOUT_S = 30.0  # of a request; the machine may be busy

OpenTier = Callable[[int], Tier]
"""Opens a tier of values up to a number of bytes. Later tiers find the blocks of earlier ones."""


@contextmanager
def disk(folder: Path) -> Iterator[OpenTier]:
    from kvcache.tiers.disk import PAGE, DiskTier

    def open_tier(nbytes: int) -> Tier:
        capacity = capacity_for(DISK_SLOTS, -(-nbytes // PAGE) * PAGE)
        return DiskTier(block_nbytes=nbytes, path=str(folder / "tier"), capacity=capacity)

    yield open_tier


@contextmanager
def redis(folder: Path) -> Iterator[OpenTier]:
    pytest.importorskip("redis")
    from kvcache.tiers.redis import RedisTier
    from tests.support import redis_servers

    with redis_servers.server(folder) as server:
        yield lambda _: RedisTier(url=server.url, timeout_s=TIMEOUT_S)


@contextmanager
def object_folder(folder: Path) -> Iterator[OpenTier]:
    pytest.importorskip("obstore")
    from kvcache.tiers.object import ObjectTier

    yield lambda _: ObjectTier(url=str(folder))


@contextmanager
def object_s3(folder: Path) -> Iterator[OpenTier]:
    pytest.importorskip("obstore")
    from kvcache.tiers.object import ObjectTier
    from tests.support import s3_server

    with s3_server.server(folder) as server, pytest.MonkeyPatch.context() as patch:
        s3_server.set_login(patch)
        yield lambda _: ObjectTier(**server.options("blocks", timeout_s=TIMEOUT_S))


@contextmanager
def mooncake(folder: Path) -> Iterator[OpenTier]:
    from tests.support import mooncake_pool

    mooncake_pool.skip_without_package()
    from kvcache.tiers.mooncake import MooncakeTier

    with mooncake_pool.pool(folder) as pool:
        yield lambda _: MooncakeTier(**pool.options(timeout_s=TIMEOUT_S))


class StoringKind(NamedTuple):
    """A kind of tier.

    Attributes:
        start: starts what the tier needs, in an empty folder.
        server: whether that is a server.
        framed: whether the tier must be in frames.
    """

    start: Callable[[Path], AbstractContextManager[OpenTier]]
    server: bool = True
    framed: bool = False


KINDS = {
    "disk": StoringKind(disk, server=False),
    "redis": StoringKind(redis),
    "object-folder": StoringKind(object_folder, server=False),
    "object-s3": StoringKind(object_s3),
    "mooncake": StoringKind(mooncake, framed=True),
}
