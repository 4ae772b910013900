"""Framed: the contract of tiers, the frames that it writes, its counts and its memory."""

import ctypes
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytest.importorskip("zstandard")

from kvcache import telemetry
from kvcache.lower.caller import PIECE_NBYTES
from kvcache.sizes import Size
from kvcache.testing import TierTests, block_of, keys_of, run_in_threads
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import HEADER_NBYTES, PAGE, Framed, frame_nbytes
from kvcache.tiers.framed import format as frame_format
from kvcache.tiers.framed import tier as framed_tier
from tests.support.frames import (
    BLOCK_NBYTES,
    CODEC_OFFSET,
    Codec,
    DictTier,
    framed_with_one_block,
    get,
    kv_like_block,
    put,
    views,
)

# The contract, around several inner tiers


class TestFramed(TierTests):
    @pytest.fixture(params=["none", "zstd"])
    def tier(self, request: pytest.FixtureRequest) -> Iterator[Framed]:
        inner = DictTier()
        with closing(Framed(inner, block_nbytes=self.block_nbytes, codec=request.param)) as tier:
            yield tier


class TestFramedWithBlocksOfPartialPages(TestFramed):
    block_nbytes = PAGE + 5


class TestFramedDram(TierTests):
    @pytest.fixture
    def tier(self) -> Iterator[Framed]:
        nbytes = frame_nbytes(self.block_nbytes)
        inner = DramTier(block_nbytes=nbytes, capacity=Size(nbytes * self.room_blocks))
        with closing(Framed(inner, block_nbytes=self.block_nbytes)) as tier:
            yield tier


class TestFramedTwice(TierTests):
    @pytest.fixture
    def tier(self) -> Iterator[Framed]:
        inner = Framed(DictTier(), block_nbytes=frame_nbytes(self.block_nbytes), codec="zstd")
        with closing(Framed(inner, block_nbytes=self.block_nbytes)) as tier:
            yield tier


# The frames


@pytest.mark.parametrize("codec", ["none", "zstd"])
@given(
    block=st.binary(max_size=3 * PAGE)
    | st.builds(
        kv_like_block, st.integers(1, BLOCK_NBYTES // 2).map(lambda n: 2 * n), st.integers(0, 9)
    )
    | st.builds(
        lambda nbytes, byte: bytes([byte]) * nbytes,
        st.integers(1, BLOCK_NBYTES),
        st.integers(0, 255),
    ),
    key=st.binary(min_size=1, max_size=64),
    element=st.integers(1, 5),
    level=st.integers(1, 5),
)
def test_framed_load_returns_any_stored_block(
    codec: Codec, block: bytes, key: bytes, element: int, level: int
) -> None:
    inner = DictTier()
    tier = Framed(
        inner, block_nbytes=BLOCK_NBYTES, codec=codec, level=level, element_nbytes=element
    )
    assert tier.store([key], [memoryview(block)]) == [len(block) > 0]
    assert get(tier, key) == (block or None)
    assert sum(map(len, inner.values.values())) % PAGE == 0
    for reader_codec in ("none", "zstd"):  # a frame describes itself
        assert get(Framed(inner, block_nbytes=BLOCK_NBYTES, codec=reader_codec), key) == (
            block or None
        )


@pytest.mark.parametrize(
    "nbytes", [1, 2, 3, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 1, BLOCK_NBYTES - 1]
)
def test_framed_load_returns_blocks_of_unaligned_sizes(nbytes: int) -> None:
    inner = DictTier()
    tier = Framed(inner, block_nbytes=BLOCK_NBYTES, codec="zstd")
    for at, block in enumerate(
        (bytes(nbytes), block_of(b"unaligned", nbytes), b"\1\2\3" * BLOCK_NBYTES)
    ):
        [key] = keys_of(f"unaligned {at}", 1)
        put(tier, key, block[:nbytes])
        assert get(tier, key) == block[:nbytes]


def test_framed_store_of_empty_block_declines_it() -> None:
    inner = DictTier()
    tier = Framed(inner, block_nbytes=8)
    keys = keys_of("empty", 3)
    blocks = [memoryview(b"a"), memoryview(b""), memoryview(b"c")]
    assert tier.store(keys, blocks) == [True, False, True]
    assert [get(tier, key, 8) for key in keys] == [b"a", None, b"c"]


@pytest.mark.parametrize(
    ("zero_nbytes", "codec"),
    [
        (0, frame_format.RAW),
        (4 * PAGE + PAGE // 2, frame_format.RAW),  # 37 pages of 41
        (5 * PAGE + PAGE // 2, frame_format.ZSTD),  # 36 pages of 41
        (20 * PAGE, frame_format.ZSTD),
    ],
)
def test_framed_store_compresses_only_when_frame_shrinks_by_a_tenth(
    zero_nbytes: int, codec: int
) -> None:
    inner = DictTier()
    tier = Framed(inner, block_nbytes=40 * PAGE, codec="zstd")
    block = bytearray(block_of(b"noise", 40 * PAGE))
    block[1 : 2 * zero_nbytes : 2] = bytes(zero_nbytes)
    [key] = keys_of("shrink", 1)
    put(tier, key, block)
    frame = inner.values[key]
    assert frame[CODEC_OFFSET] == codec
    if codec == frame_format.RAW:
        assert frame[HEADER_NBYTES:] == block
    else:
        assert 10 * len(frame) <= 9 * frame_nbytes(40 * PAGE)
    assert get(tier, key, 40 * PAGE) == bytes(block)
    stats = tier.stats()
    raw = int(codec == frame_format.RAW)
    assert (stats.stored_raw_blocks, stats.stored_compressed_blocks) == (raw, 1 - raw)


def test_framed_stats_count_stored_loaded_and_rejected_blocks() -> None:
    tier, inner, key, _ = framed_with_one_block("zstd")
    nbytes = len(inner.values[key])
    assert nbytes < BLOCK_NBYTES
    stats = tier.stats()
    assert stats == framed_tier.FrameStats(1, 0, 1, BLOCK_NBYTES, nbytes, BLOCK_NBYTES, nbytes)
    inner.values[key] = bytes(nbytes)
    assert get(tier, key) is None
    assert stats.rejected == {}, "a returned snapshot changed"
    assert tier.stats() == framed_tier.FrameStats(
        1, 0, 1, BLOCK_NBYTES, nbytes, BLOCK_NBYTES, nbytes, tier.stats().rejected
    )
    assert tier.stats().rejected == {"magic": 1}


def test_framed_passes_page_aligned_frames_to_inner_tier() -> None:
    class AlignmentCheckingTier(DictTier):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            check_aligned(into)
            return super().load(keys, into)

        def store(
            self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
        ) -> list[bool]:
            check_aligned(blocks)
            return super().store(keys, blocks, parent)

    def check_aligned(buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0
            assert len(buffer) % PAGE == 0

    tier = Framed(AlignmentCheckingTier(), block_nbytes=PAGE + 5, codec="zstd")
    keys = keys_of("aligned", 9)
    blocks = [memoryview(block_of(key, PAGE + 5)) for key in keys]
    assert tier.store(keys, blocks) == [True] * 9
    assert tier.load(keys, [memoryview(bytearray(PAGE + 5)) for _ in keys]) == [PAGE + 5] * 9
    assert HEADER_NBYTES % PAGE == 0


# Without zstandard


def test_framed_load_of_compressed_block_without_zstandard_misses_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, inner, key, block = framed_with_one_block("zstd")
    [raw] = keys_of("raw", 1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setitem(sys.modules, "zstandard", None)
        tier = Framed(inner, block_nbytes=BLOCK_NBYTES)
        put(tier, raw, block)
        assert get(tier, raw) == block
        assert get(tier, key) is None
        assert get(tier, key) is None
        assert tier.stats().rejected == {"codec": 2}
        with pytest.raises(ImportError, match=r"pip install 'kvcache\[zstd\]'"):
            Framed(inner, block_nbytes=BLOCK_NBYTES, codec="zstd")
    assert len(caplog.records) == 1, "one warning is logged, not one for each block"
    assert get(Framed(inner, block_nbytes=BLOCK_NBYTES), key) == block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_nbytes": 0}, "block_nbytes is 0; a block has at least one byte"),
        ({"level": 0}, "level is 0; zstd takes 1 to 22"),
        ({"level": 23}, "level is 23; zstd takes 1 to 22"),
        ({"element_nbytes": 0}, "element_nbytes is 0; it can be 1 to 16"),
        ({"element_nbytes": 17}, "element_nbytes is 17; it can be 1 to 16"),
    ],
)
def test_framed_with_invalid_option_raises_value_error(
    options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Framed(DictTier(), **{"block_nbytes": 8, **options})  # type: ignore[arg-type]


def test_framed_store_of_too_large_block_raises_value_error() -> None:
    inner = DictTier()
    tier = Framed(inner, block_nbytes=8)
    with pytest.raises(ValueError, match="a block of 9 bytes; the frames here hold 8"):
        tier.store(keys_of("large", 2), [memoryview(bytes(8)), memoryview(bytes(9))])
    assert inner.values == {}
    with pytest.raises(ValueError, match=r"longer|shorter"):
        tier.store(keys_of("large", 2), [memoryview(bytes(8))])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        tier.load(keys_of("large", 1), [])


# Bounds


def test_framed_memory_does_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces: list[int] = []
    make = frame_format.Workspace.__init__

    def counted(workspace: frame_format.Workspace, *arguments: Any) -> None:
        make(workspace, *arguments)
        workspaces.append(workspace.nbytes)

    monkeypatch.setattr(frame_format.Workspace, "__init__", counted)
    inner = DictTier()
    tier = Framed(inner, block_nbytes=PAGE * 16)
    keys = keys_of("long", 1000)
    blocks = [memoryview(block_of(key, PAGE * 16)) for key in keys]
    assert tier.store(keys, blocks) == [True] * 1000
    into = [memoryview(bytearray(PAGE * 16)) for _ in keys]
    assert tier.load(keys, into) == [PAGE * 16] * 1000
    assert into == blocks
    assert len(workspaces) == 1, "calls one after the other share a workspace"
    assert (
        max(inner.max_call_nbytes, *workspaces) <= inner.call_nbytes * 17 // 16
    )  # plus the headers


@pytest.mark.parametrize("block_nbytes", [64 << 10, 1 << 20, 2 << 20])
def test_framed_passes_a_call_of_the_stack_as_one_call_to_inner_tier(block_nbytes: int) -> None:
    """A last piece of one block would be read alone, with nothing to overlap."""

    class PieceRecordingTier(DictTier):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            pieces.append(len(keys))
            return super().load(keys, into)

    pieces: list[int] = []
    count = PIECE_NBYTES // block_nbytes
    tier = Framed(PieceRecordingTier(), block_nbytes=block_nbytes)
    tier.load(keys_of("call", count), [memoryview(bytearray(block_nbytes))] * count)
    assert pieces == [count]
    PieceRecordingTier.call_nbytes = PIECE_NBYTES // 4  # of a tier that prefers smaller calls
    tier = Framed(PieceRecordingTier(), block_nbytes=block_nbytes)
    tier.load(keys_of("call", count), [memoryview(bytearray(block_nbytes))] * count)
    assert pieces[1:] == [count // 4] * 4


def test_blocks_larger_than_a_desk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DictTier, "call_nbytes", PAGE)
    tier = Framed(DictTier(), block_nbytes=BLOCK_NBYTES)
    keys = keys_of("larger", 3)
    blocks = [kv_like_block(BLOCK_NBYTES, at) for at in range(3)]
    assert tier.store(keys, views(blocks)) == [True] * 3
    assert [get(tier, key) for key in keys] == blocks


def test_framed_concurrent_calls_are_bounded_and_do_not_mix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There are more threads than workspaces, and all compress."""
    workspaces: list[frame_format.Workspace] = []
    make = frame_format.Workspace.__init__

    def counted(workspace: frame_format.Workspace, *arguments: Any) -> None:
        make(workspace, *arguments)
        workspaces.append(workspace)

    monkeypatch.setattr(frame_format.Workspace, "__init__", counted)

    active, max_active, lock = 0, 0, threading.Lock()
    all_active = threading.Event()

    class CountingTier(DictTier):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            nonlocal active, max_active
            with lock:
                active += 1
                max_active = max(max_active, active)
                if active == framed_tier.MAX_CONCURRENT_CALLS:
                    all_active.set()
            assert all_active.wait(60), "fewer calls run than there are workspaces"
            written = super().load(keys, into)
            with lock:
                active -= 1
            return written

    tier = Framed(CountingTier(), block_nbytes=BLOCK_NBYTES, codec="zstd")

    def work(thread: int) -> None:
        keys = keys_of(f"thread {thread}", 3)
        blocks = [kv_like_block(BLOCK_NBYTES, 10 * thread + at) for at in range(3)]
        assert tier.store(keys, views(blocks)) == [True] * 3
        for _ in range(10):
            into = [bytearray(BLOCK_NBYTES) for _ in keys]
            assert tier.load(keys, views(into)) == [BLOCK_NBYTES] * 3
            assert into == blocks

    run_in_threads(2 * framed_tier.MAX_CONCURRENT_CALLS, work)
    assert max_active == len(workspaces) == framed_tier.MAX_CONCURRENT_CALLS
    assert tier.stats().verified_blocks == 2 * framed_tier.MAX_CONCURRENT_CALLS * 30
    assert tier.stats().rejected == {}


def test_framed_load_records_codec_and_rejections_in_the_span(
    exported: InMemorySpanExporter,
) -> None:
    inner = DictTier()
    tier = Framed(inner, block_nbytes=64)
    tier.store([b"k"], [memoryview(bytes(64))])
    inner.values[b"k"] = inner.values[b"k"][:-1] + b"\1"
    span = telemetry.start_span("parent", None)
    with telemetry.use_span(span):
        assert tier.load([b"k"], [memoryview(bytearray(64))]) == [0]
    span.end()
    [ended] = exported.get_finished_spans()
    assert dict(ended.attributes or {}) == {"kvcache.codec": "none"}
    [event] = ended.events
    assert event.name == "kvcache.frame.rejected"
    assert dict(event.attributes or {}) == {"kvcache.frame.reason": "padding"}
