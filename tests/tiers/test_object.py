"""ObjectTier on a real S3 server: the contract of tiers, sharing, and forked children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest

pytest.importorskip("obstore")
pytest.importorskip("xxhash")

from kvcache.testing import TierTests, block_of, keys_of
from kvcache.tiers.framed import Framed
from kvcache.tiers.object import ObjectTier
from kvcache.tiers.object.names import block_name, reset_name
from tests.support import s3_server
from tests.support.forked_children import methods_usable_in_child, run_in_child
from tests.support.s3_server import Server

_prefixes = (f"test/{number}" for number in count())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix without objects."""
    return next(_prefixes)


@pytest.fixture
def tier(server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectTier]:
    s3_server.set_login(monkeypatch)
    with closing(ObjectTier(**server.options(prefix, timeout_s=60))) as tier:
        yield tier


class TestObjectTier(TierTests):
    pass


class TestFramedObjectTier(TierTests):
    @pytest.fixture
    def tier(
        self, server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Framed]:
        s3_server.set_login(monkeypatch)
        inner = ObjectTier(**server.options(prefix, timeout_s=60))
        with closing(Framed(inner, block_nbytes=self.block_nbytes)) as tier:
            yield tier


def loaded(tier: ObjectTier | Framed, keys: list[bytes], nbytes: int = 4096) -> list[bytes]:
    """Load; return the bytes of each block, b"" for a miss."""
    into = [bytearray(nbytes) for _ in keys]
    written = tier.load(keys, [memoryview(buffer) for buffer in into])
    return [bytes(buffer[:count]) for buffer, count in zip(into, written, strict=True)]


def test_objects_are_below_the_prefix(tier: ObjectTier, server: Server, prefix: str) -> None:
    keys = keys_of("names", 3, 64)
    tier.store(keys, [memoryview(block_of(key, 100)) for key in keys])
    assert server.names(prefix) == sorted(f"{prefix}/{block_name(key)}" for key in keys)
    assert server.get(f"{prefix}/{block_name(keys[1])}") == block_of(keys[1], 100)


def test_two_tiers_share_and_the_first_value_stays(
    tier: ObjectTier, server: Server, prefix: str
) -> None:
    keys = keys_of("shared", 4)
    first, other = ([memoryview(bytes([value]) * 4096) for _ in keys] for value in (1, 2))
    with closing(ObjectTier(**server.options(prefix, timeout_s=60))) as second:
        assert tier.store(keys[:3], first[:3]) == [True] * 3
        assert second.contains(keys) == [True, True, True, False]
        assert second.store(keys, other) == [True] * 4
        assert loaded(tier, keys) == [bytes([1]) * 4096] * 3 + [bytes([2]) * 4096]


def test_mode_overwrite_replaces_the_value(
    server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.set_login(monkeypatch)
    keys = keys_of("replaced", 1)
    with closing(ObjectTier(**server.options(prefix, mode="overwrite", timeout_s=60))) as tier:
        for value in (1, 2):
            assert tier.store(keys, [memoryview(bytes([value]) * 4096)]) == [True]
            assert loaded(tier, keys) == [bytes([value]) * 4096]


def test_truncated_swapped_and_foreign_objects_are_misses_and_removed(
    tier: ObjectTier, server: Server, prefix: str
) -> None:
    keys = keys_of("damaged", 7)
    names = [f"{prefix}/{block_name(key)}" for key in keys]
    framed = Framed(tier, block_nbytes=4096)
    framed.store(keys, [memoryview(block_of(key, 4096)) for key in keys])
    frames = [server.get(name) for name in names]
    damaged = {
        1: frames[1][:-4096],  # truncated
        2: frames[3],  # swapped: the frame of another key
        3: frames[2],
        4: bytes(len(frames[4])),  # foreign, of the same size
        5: frames[5] + b"more",  # too long
        6: b"",
    }
    for at, value in damaged.items():
        server.put(names[at], value)
    assert loaded(framed, keys) == [block_of(keys[0], 4096)] + [b""] * 6
    assert server.names(prefix) == names[:1]
    framed.store(keys, [memoryview(block_of(key, 4096)) for key in keys])
    assert loaded(framed, keys) == [block_of(key, 4096) for key in keys]


def test_object_that_was_deleted_is_a_miss(tier: ObjectTier, server: Server, prefix: str) -> None:
    keys = keys_of("expired", 3)
    tier.store(keys, [memoryview(block_of(key, 4096)) for key in keys])
    server.delete(f"{prefix}/{block_name(keys[1])}")  # as a lifecycle rule does
    assert tier.contains(keys) == [True, False, True]
    assert [bool(block) for block in loaded(tier, keys)] == [True, False, True]


def test_reset_outlasts_the_tier(tier: ObjectTier, server: Server, prefix: str) -> None:
    namespace = keys_of("namespace", 1)[0]
    assert tier.resolve(namespace, '{"model": "a"}') == namespace
    tier.forget(namespace)
    assert len(server.get(f"{prefix}/{reset_name(namespace)}")) == 16
    with closing(ObjectTier(**server.options(prefix, timeout_s=60))) as later:
        resolved = later.resolve(namespace, '{"model": "a"}')
    assert resolved != namespace
    about = [name for name in server.names(prefix) if "/about/" in name]
    assert sorted(name[-64:] for name in about) == sorted([namespace.hex(), resolved.hex()])
    assert server.get(about[0]) == b'{"model": "a"}'


def test_tier_in_forked_child_raises_and_parent_goes_on(tier: ObjectTier) -> None:
    keys = keys_of("parent", 4)
    assert all(tier.store(keys, [memoryview(block_of(key, 4096)) for key in keys]))
    assert methods_usable_in_child(tier) == []
    run_in_child(tier.close)
    assert loaded(tier, keys) == [block_of(key, 4096) for key in keys]
