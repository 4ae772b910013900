"""ObjectTier on a folder: the contract of tiers, names of objects, and forked children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("obstore")
pytest.importorskip("xxhash")

from kvcache.testing import TierTests, block_of, keys_of
from kvcache.tiers.framed import Framed, frame_nbytes
from kvcache.tiers.object import ObjectTier
from tests.support.forked_children import methods_usable_in_child, run_in_child


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[ObjectTier]:
    with closing(ObjectTier(url=str(tmp_path / "new" / "folder"))) as tier:
        yield tier


class TestObjectTierOnAFolder(TierTests):
    pass


class TestObjectTierByFileUrl(TierTests):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[ObjectTier]:
        with closing(ObjectTier(url=f"file://{tmp_path}/a%20folder")) as tier:
            yield tier
        assert [path.name for path in tmp_path.iterdir()] == ["a folder"]


class TestFramedObjectTierOnAFolder(TierTests):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Framed]:
        inner = ObjectTier(url=str(tmp_path))
        with closing(Framed(inner, block_nbytes=self.block_nbytes)) as tier:
            yield tier


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_objects_are_named_by_namespace_and_key_in_hex(tmp_path: Path) -> None:
    namespace, key = keys_of("namespace", 1)[0], keys_of("key", 1)[0]
    with closing(ObjectTier(url=str(tmp_path))) as tier:
        tier.store([namespace + key, namespace], [memoryview(b"a"), memoryview(b"b")])
        tier.resolve(namespace, "{}")
        tier.forget(namespace)
    block = f"kvcache/1/block/{namespace.hex()}"
    assert files_below(tmp_path) == [
        f"kvcache/1/about/{namespace.hex()}",
        f"{block}/-/-",
        f"{block}/{key[:1].hex()}/{key.hex()}",
        f"kvcache/1/reset/{namespace.hex()}",
    ]


def test_long_keys_are_stored_under_their_digests(tmp_path: Path) -> None:
    keys = [bytes(300), bytes(301), bytes(1000), bytes(132)]
    with closing(ObjectTier(url=str(tmp_path))) as tier:
        blocks = [memoryview(bytes([at]) * 10) for at in range(len(keys))]
        assert tier.store(keys, blocks) == [True] * 4
        into = [bytearray(10) for _ in keys]
        assert tier.load(keys, [memoryview(buffer) for buffer in into]) == [10] * 4
        assert into == blocks


@pytest.mark.parametrize("nbytes", [0, 65, 1000])
def test_load_of_empty_or_too_long_object_misses_and_removes_it(
    tmp_path: Path, nbytes: int
) -> None:
    keys = keys_of("length", 3, 64)
    with closing(ObjectTier(url=str(tmp_path))) as tier:
        tier.store(keys, [memoryview(block_of(key, 64)) for key in keys])
        [path] = tmp_path.rglob(keys[1][32:].hex())
        path.write_bytes(bytes(nbytes))
        into = [bytearray(64) for _ in keys]
        assert tier.load(keys, [memoryview(buffer) for buffer in into]) == [64, 0, 64]
        assert into[1] == bytes(64)
        assert not path.exists()
        assert tier.contains(keys) == [True, False, True]


def test_short_object_in_a_frame_misses_and_is_removed(tmp_path: Path) -> None:
    keys = keys_of("short", 3)
    with closing(Framed(ObjectTier(url=str(tmp_path)), block_nbytes=8192)) as tier:
        tier.store(keys, [memoryview(block_of(key, 8192)) for key in keys])
        paths = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.stat().st_size for path in paths} == {frame_nbytes(8192)}
        for path in paths:
            path.write_bytes(path.read_bytes()[:-1])
        into = [bytearray(8192) for _ in keys]
        assert tier.load(keys, [memoryview(buffer) for buffer in into]) == [0] * 3
        assert into == [bytes(8192)] * 3
        assert tier.stats().rejected == {"length": 3}
        assert tier.contains(keys) == [False] * 3


def test_folder_that_became_read_only_declines_stores_and_serves_loads(
    tier: ObjectTier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys, new = keys_of("full", 2), keys_of("new", 2)
    tier.store(keys, [memoryview(block_of(key, 64)) for key in keys])
    blocks = tmp_path / "new" / "folder" / "kvcache" / "1" / "block"
    moved = blocks.with_name("moved")
    blocks.rename(moved)
    blocks.write_bytes(b"a file where the folder was")
    for _ in range(2):
        assert tier.store(new, [memoryview(block_of(key, 64)) for key in new]) == [False] * 2
    blocks.unlink()
    moved.rename(blocks)
    assert tier.contains([*keys, *new]) == [True, True, False, False]
    [message] = [record.getMessage() for record in caplog.records]
    assert "a PUT request failed (" in message


def test_tier_in_forked_child_raises_and_parent_goes_on(tier: ObjectTier) -> None:
    keys = keys_of("parent", 2)
    blocks = [memoryview(block_of(key, 64)) for key in keys]
    assert tier.store(keys, blocks) == [True] * 2
    assert methods_usable_in_child(tier) == []
    run_in_child(tier.close)
    into = [bytearray(64) for _ in keys]
    assert tier.load(keys, [memoryview(buffer) for buffer in into]) == [64] * 2
    assert into == blocks


def test_reset_outlasts_the_tier(tmp_path: Path) -> None:
    namespace = keys_of("namespace", 1)[0]
    with closing(ObjectTier(url=str(tmp_path))) as tier:
        assert tier.resolve(namespace, "") == namespace
        tier.forget(namespace)
        assert tier.resolve(b"", "") == b""
    with closing(ObjectTier(url=str(tmp_path))) as tier:
        once = tier.resolve(namespace, "")
        assert once != namespace
        assert len(once) == len(namespace)
        tier.forget(namespace)
        assert tier.resolve(namespace, "") not in (namespace, once)


def test_reset_of_another_size_is_a_failure(tmp_path: Path) -> None:
    namespace = keys_of("namespace", 1)[0]
    with closing(ObjectTier(url=str(tmp_path))) as tier:
        for value in (b"", b"15 bytes of it.", b"17 bytes in here.", bytes(1000)):
            tier.forget(namespace)
            path = tmp_path / "kvcache" / "1" / "reset" / namespace.hex()
            path.write_bytes(value)
            with pytest.raises(ConnectionError, match="has another size"):
                tier.resolve(namespace, "")
