"""Frames in the memory of the inner tier: what is in it, and when nothing touches it any more."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("zstandard")

from kvcache.testing import TierTests, keys_of
from kvcache.tiers.framed import PAGE, Framed, frame_nbytes
from tests.support.frames import BLOCK_NBYTES, Codec, DictTier, get, kv_like_block, put, views

LONG = 20.0  # the most seconds that a test waits for an event that happens


class MemoryTier(DictTier):
    """A tier with memory, which refuses to transfer from and to any other memory.

    Attributes:
        maps: the memory that it gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[mmap.mmap] = []

    def allocate(self, nbytes: int) -> memoryview | None:
        self.maps.append(mmap.mmap(-1, nbytes + PAGE))
        return memoryview(self.maps[-1])

    def check(self, buffers: Sequence[memoryview]) -> None:
        assert all(any(buffer.obj is each for each in self.maps) for buffer in buffers)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        self.check(into)
        return super().load(keys, into)

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        self.check(blocks)
        return super().store(keys, blocks, parent)


class TestFramedInMemoryOfTheTier(TierTests):
    @pytest.fixture(params=["none", "zstd"])
    def tier(self, request: pytest.FixtureRequest) -> Iterator[Framed]:
        inner = MemoryTier()
        with closing(Framed(inner, block_nbytes=self.block_nbytes, codec=request.param)) as tier:
            yield tier


class TestFramedPartialPagesInMemoryOfTheTier(TestFramedInMemoryOfTheTier):
    block_nbytes = PAGE + 5


@pytest.mark.parametrize("element_nbytes", [1, 2, 3, 4])
@given(
    block=st.binary(min_size=1, max_size=2 * PAGE)
    | st.builds(
        kv_like_block, st.integers(1, BLOCK_NBYTES // 2).map(lambda n: 2 * n), st.integers(0, 9)
    )
)
def test_framed_in_memory_of_the_tier_writes_and_reads_the_same_frames(
    element_nbytes: int, block: bytes
) -> None:
    codecs: tuple[Codec, ...] = ("none", "zstd")
    for codec in codecs:
        inner, own = MemoryTier(), DictTier()
        for each in (inner, own):
            tier = Framed(
                each, block_nbytes=BLOCK_NBYTES, codec=codec, element_nbytes=element_nbytes
            )
            put(tier, b"k", block)
            assert get(tier, b"k") == block
        assert inner.values == own.values


def test_framed_asks_for_the_memory_of_a_workspace_once() -> None:
    inner = MemoryTier()
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES)
    for key in keys_of("once", 3):
        put(tier, key, kv_like_block(BLOCK_NBYTES))
        assert get(tier, key) == kv_like_block(BLOCK_NBYTES)
    [memory] = inner.maps
    frames = inner.call_nbytes // BLOCK_NBYTES
    assert len(memory) == frames * frame_nbytes(BLOCK_NBYTES) + PAGE


def fail(_: int) -> memoryview:
    raise OSError("no pool")


@pytest.mark.parametrize(
    ("allocate", "cause"),
    [
        (fail, "OSError: no pool"),
        (
            bytearray,
            "TypeError: allocate returned bytearray, not a memoryview",
        ),
        (lambda nbytes: memoryview(bytes(nbytes)), "memory that cannot hold"),
        (lambda nbytes: memoryview(bytearray(nbytes - 1)), "memory that cannot hold"),
        (lambda nbytes: memoryview(bytearray(2 * nbytes))[::2], "memory that cannot hold"),
    ],
    ids=["raises", "no view", "read-only", "too small", "not contiguous"],
)
def test_framed_with_unusable_memory_of_the_tier_maps_its_own(
    allocate: Callable[[int], Any], cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    class UnusableMemoryTier(DictTier):
        def allocate(self, nbytes: int) -> memoryview | None:
            calls.append(nbytes)
            memory: memoryview = allocate(nbytes)
            return memory

    tier = Framed(UnusableMemoryTier(), block_nbytes=BLOCK_NBYTES)
    block = kv_like_block(BLOCK_NBYTES)
    for key in keys_of("unusable", 2):
        put(tier, key, block)
        assert get(tier, key) == block
    assert len(calls) == 4  # once for each call
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert record.getMessage().startswith("kvcache: frames: no memory of the tier (")
    assert cause in record.getMessage()


def test_framed_asks_again_for_memory_after_a_failure() -> None:
    class ConnectingTier(MemoryTier):
        connected = False

        def allocate(self, nbytes: int) -> memoryview | None:
            if not self.connected:
                raise ConnectionError("no client is open yet")
            return super().allocate(nbytes)

        def check(self, buffers: Sequence[memoryview]) -> None:
            if self.connected:
                super().check(buffers)

    inner, block = ConnectingTier(), kv_like_block(BLOCK_NBYTES)
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES)
    put(tier, b"k", block)
    inner.connected = True
    assert get(tier, b"k") == block
    assert len(inner.maps) == 1


class LateTier(MemoryTier):
    """A tier with calls that last until after ``close``, which overwrites its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs = False
        self.waiting = threading.Event()
        self.gate = threading.Event()

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        written = super().load(keys, into)
        if self.hangs:
            self.waiting.set()
            assert self.gate.wait(LONG)
        return written

    def close(self) -> None:
        for each in self.maps:
            each[:] = b"\xee" * len(each)


def test_framed_closed_during_a_call_no_longer_touches_memory_of_the_tier() -> None:
    inner = LateTier()
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES)
    block, buffer = kv_like_block(BLOCK_NBYTES), bytearray(BLOCK_NBYTES)
    put(tier, b"k", block)
    inner.hangs = True
    errors: list[ValueError] = []

    def load_late() -> None:
        try:
            tier.load([b"k"], views([buffer]))
        except ValueError as error:
            errors.append(error)

    late = threading.Thread(target=load_late)
    late.start()
    assert inner.waiting.wait(LONG)
    tier.close()
    inner.gate.set()
    late.join(LONG)
    assert [str(error) for error in errors] == ["the tier is closed, and its memory with it"]
    assert buffer == bytes(BLOCK_NBYTES)
    with pytest.raises(ValueError, match="the tier is closed"):
        tier.store([b"other"], views([block]))
    [memory] = inner.maps
    assert set(memory[:]) == {0xEE}


def test_framed_closed_while_it_asks_for_memory_does_not_use_it() -> None:
    class ClosingTier(MemoryTier):
        def allocate(self, nbytes: int) -> memoryview | None:
            memory = super().allocate(nbytes)
            tier.close()
            return memory

    inner = ClosingTier()
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES)
    with pytest.raises(ValueError, match="the tier is closed"):
        tier.store([b"k"], views([kv_like_block(BLOCK_NBYTES)]))
    assert not any(inner.maps[0][:])
