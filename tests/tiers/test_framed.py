"""Framed keeps the contract around other tiers; what it writes, what it counts, what bounds it."""

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
from kvcache.lower.tier import PIECE_NBYTES
from kvcache.sizes import Size
from kvcache.testing import TierTests, block_of, keys_of, run_in_threads
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import HEADER_NBYTES, PAGE, Framed, frame_nbytes
from kvcache.tiers.framed import format as frame_format
from kvcache.tiers.framed import tier as framed_tier
from tests.support.frames import BLOCK, CODEC_AT, Codec, Frames, get, like_kv, of, put, views

# The contract, around several inner tiers


class TestFramed(TierTests):
    @pytest.fixture(params=["none", "zstd"])
    def tier(self, request: pytest.FixtureRequest) -> Iterator[Framed]:
        inner = Frames()
        with closing(Framed(inner, block_nbytes=self.block_nbytes, codec=request.param)) as tier:
            yield tier


class TestFramedBlocksThatAreNotWholePages(TestFramed):
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
        inner = Framed(Frames(), block_nbytes=frame_nbytes(self.block_nbytes), codec="zstd")
        with closing(Framed(inner, block_nbytes=self.block_nbytes)) as tier:
            yield tier


# What is written


@pytest.mark.parametrize("codec", ["none", "zstd"])
@given(
    block=st.binary(max_size=3 * PAGE)
    | st.builds(like_kv, st.integers(1, BLOCK // 2).map(lambda n: 2 * n), st.integers(0, 9))
    | st.builds(
        lambda nbytes, byte: bytes([byte]) * nbytes, st.integers(1, BLOCK), st.integers(0, 255)
    ),
    key=st.binary(min_size=1, max_size=64),
    element=st.integers(1, 5),
    level=st.integers(1, 5),
)
def test_any_block_comes_back(
    codec: Codec, block: bytes, key: bytes, element: int, level: int
) -> None:
    inner = Frames()
    tier = Framed(inner, block_nbytes=BLOCK, codec=codec, level=level, element_nbytes=element)
    assert tier.store([key], [memoryview(block)]) == [len(block) > 0]
    assert get(tier, key) == (block or None)
    assert sum(map(len, inner.held.values())) % PAGE == 0
    for read_with in ("none", "zstd"):  # frames describe themselves
        assert get(Framed(inner, block_nbytes=BLOCK, codec=read_with), key) == (block or None)


@pytest.mark.parametrize("nbytes", [1, 2, 3, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 1, BLOCK - 1])
def test_sizes_that_are_odd(nbytes: int) -> None:
    inner = Frames()
    tier = Framed(inner, block_nbytes=BLOCK, codec="zstd")
    for at, block in enumerate((bytes(nbytes), block_of(b"odd", nbytes), b"\1\2\3" * BLOCK)):
        [key] = keys_of(f"odd {at}", 1)
        put(tier, key, block[:nbytes])
        assert get(tier, key) == block[:nbytes]


def test_an_empty_block_is_declined() -> None:
    inner = Frames()
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
def test_a_block_stays_raw_unless_its_frame_shrinks_by_a_tenth(
    zero_nbytes: int, codec: int
) -> None:
    inner = Frames()
    tier = Framed(inner, block_nbytes=40 * PAGE, codec="zstd")
    block = bytearray(block_of(b"noise", 40 * PAGE))
    block[1 : 2 * zero_nbytes : 2] = bytes(zero_nbytes)
    [key] = keys_of("shrink", 1)
    put(tier, key, block)
    frame = inner.held[key]
    assert frame[CODEC_AT] == codec
    if codec == frame_format.RAW:
        assert frame[HEADER_NBYTES:] == block
    else:
        assert 10 * len(frame) <= 9 * frame_nbytes(40 * PAGE)
    assert get(tier, key, 40 * PAGE) == bytes(block)
    stats = tier.stats()
    raw = int(codec == frame_format.RAW)
    assert (stats.stored_raw_blocks, stats.stored_compressed_blocks) == (raw, 1 - raw)


def test_counts() -> None:
    tier, inner, key, _ = of("zstd")
    nbytes = len(inner.held[key])
    assert nbytes < BLOCK
    stats = tier.stats()
    assert stats == framed_tier.FrameStats(1, 0, 1, BLOCK, nbytes, BLOCK, nbytes)
    inner.held[key] = bytes(nbytes)
    assert get(tier, key) is None
    assert stats.rejected == {}, "counts of an earlier moment changed"
    assert tier.stats() == framed_tier.FrameStats(
        1, 0, 1, BLOCK, nbytes, BLOCK, nbytes, tier.stats().rejected
    )
    assert tier.stats().rejected == {"magic": 1}


def test_a_frame_starts_on_a_page_and_so_does_its_payload() -> None:
    class Aligned(Frames):
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

    tier = Framed(Aligned(), block_nbytes=PAGE + 5, codec="zstd")
    keys = keys_of("aligned", 9)
    blocks = [memoryview(block_of(key, PAGE + 5)) for key in keys]
    assert tier.store(keys, blocks) == [True] * 9
    assert tier.load(keys, [memoryview(bytearray(PAGE + 5)) for _ in keys]) == [PAGE + 5] * 9
    assert HEADER_NBYTES % PAGE == 0


# Without zstandard


def test_without_zstandard_a_compressed_block_is_a_miss_that_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, inner, key, block = of("zstd")
    [raw] = keys_of("raw", 1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setitem(sys.modules, "zstandard", None)
        tier = Framed(inner, block_nbytes=BLOCK)
        put(tier, raw, block)
        assert get(tier, raw) == block
        assert get(tier, key) is None
        assert get(tier, key) is None
        assert tier.stats().rejected == {"codec": 2}
        with pytest.raises(ImportError, match=r"pip install 'kvcache\[zstd\]'"):
            Framed(inner, block_nbytes=BLOCK, codec="zstd")
    assert len(caplog.records) == 1, "said once, not once a block"
    assert get(Framed(inner, block_nbytes=BLOCK), key) == block


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_nbytes": 0}, "block_nbytes is 0; a block has at least one byte"),
        ({"level": 0}, "level is 0; zstd takes 1 to 22"),
        ({"level": 23}, "level is 23; zstd takes 1 to 22"),
        ({"element_nbytes": 0}, "element_nbytes is 0; it can be 1 to 16"),
        ({"element_nbytes": 17}, "element_nbytes is 17; it can be 1 to 16"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Framed(Frames(), **{"block_nbytes": 8, **wrong})  # type: ignore[arg-type]


def test_a_block_that_is_too_large_is_an_error() -> None:
    inner = Frames()
    tier = Framed(inner, block_nbytes=8)
    with pytest.raises(ValueError, match="a block of 9 bytes; the frames here hold 8"):
        tier.store(keys_of("large", 2), [memoryview(bytes(8)), memoryview(bytes(9))])
    assert inner.held == {}
    with pytest.raises(ValueError, match=r"longer|shorter"):
        tier.store(keys_of("large", 2), [memoryview(bytes(8))])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        tier.load(keys_of("large", 1), [])


# Bounds


def test_scratch_memory_does_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    desks: list[int] = []
    make = frame_format.Workspace.__init__

    def counted(desk: frame_format.Workspace, *sizes: int) -> None:
        make(desk, *sizes)
        desks.append(len(desk._map))

    monkeypatch.setattr(frame_format.Workspace, "__init__", counted)
    inner = Frames()
    tier = Framed(inner, block_nbytes=PAGE * 16)
    keys = keys_of("long", 1000)
    blocks = [memoryview(block_of(key, PAGE * 16)) for key in keys]
    assert tier.store(keys, blocks) == [True] * 1000
    into = [memoryview(bytearray(PAGE * 16)) for _ in keys]
    assert tier.load(keys, into) == [PAGE * 16] * 1000
    assert into == blocks
    assert len(desks) == 1, "one call at a time needs one desk"
    assert max(inner.handed, *desks) <= inner.call_nbytes * 17 // 16  # and the headers


@pytest.mark.parametrize("block_nbytes", [64 << 10, 1 << 20, 2 << 20])
def test_a_call_of_the_stack_is_one_call_of_the_inner_tier(block_nbytes: int) -> None:
    """A rest of one block would be read alone, with nothing to overlap."""

    class Pieces(Frames):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            pieces.append(len(keys))
            return super().load(keys, into)

    pieces: list[int] = []
    count = PIECE_NBYTES // block_nbytes
    tier = Framed(Pieces(), block_nbytes=block_nbytes)
    tier.load(keys_of("call", count), [memoryview(bytearray(block_nbytes))] * count)
    assert pieces == [count]
    Pieces.call_nbytes = PIECE_NBYTES // 4  # of a tier that is better with less
    tier = Framed(Pieces(), block_nbytes=block_nbytes)
    tier.load(keys_of("call", count), [memoryview(bytearray(block_nbytes))] * count)
    assert pieces[1:] == [count // 4] * 4


def test_blocks_larger_than_a_desk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Frames, "call_nbytes", PAGE)
    tier = Framed(Frames(), block_nbytes=BLOCK)
    keys = keys_of("larger", 3)
    blocks = [like_kv(BLOCK, at) for at in range(3)]
    assert tier.store(keys, views(blocks)) == [True] * 3
    assert [get(tier, key) for key in keys] == blocks


def test_calls_at_once_are_bounded_and_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than desks, all with the same codec's contexts at work."""
    desks: list[frame_format.Workspace] = []
    make = frame_format.Workspace.__init__

    def counted(desk: frame_format.Workspace, *how: Any) -> None:
        make(desk, *how)
        desks.append(desk)

    monkeypatch.setattr(frame_format.Workspace, "__init__", counted)

    inside, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    class Counts(Frames):
        def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
                if inside == framed_tier._WORKSPACES:
                    full.set()
            assert full.wait(60), "fewer calls were let in than there are desks"
            written = super().load(keys, into)
            with lock:
                inside -= 1
            return written

    tier = Framed(Counts(), block_nbytes=BLOCK, codec="zstd")

    def work(thread: int) -> None:
        keys = keys_of(f"thread {thread}", 3)
        blocks = [like_kv(BLOCK, 10 * thread + at) for at in range(3)]
        assert tier.store(keys, views(blocks)) == [True] * 3
        for _ in range(10):
            into = [bytearray(BLOCK) for _ in keys]
            assert tier.load(keys, views(into)) == [BLOCK] * 3
            assert into == blocks

    run_in_threads(2 * framed_tier._WORKSPACES, work)
    assert most == len(desks) == framed_tier._WORKSPACES
    assert tier.stats().verified_blocks == 2 * framed_tier._WORKSPACES * 30
    assert tier.stats().rejected == {}


def test_a_span_knows_the_codec_and_what_was_rejected(exported: InMemorySpanExporter) -> None:
    inner = Frames()
    tier = Framed(inner, block_nbytes=64)
    tier.store([b"k"], [memoryview(bytes(64))])
    inner.held[b"k"] = inner.held[b"k"][:-1] + b"\1"
    span = telemetry.start_span("above", None)
    with telemetry.use_span(span):
        assert tier.load([b"k"], [memoryview(bytearray(64))]) == [0]
    span.end()
    [seen] = exported.get_finished_spans()
    assert dict(seen.attributes or {}) == {"kvcache.codec": "none"}
    [event] = seen.events
    assert event.name == "kvcache.frame.rejected"
    assert dict(event.attributes or {}) == {"kvcache.frame.reason": "padding"}
