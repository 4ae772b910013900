"""The format: what is read, in which order; what is refused, with its line and what it takes."""

import gzip
import json
import math
from typing import Any

import pytest

from kvcache.replay.trace import BLOCK_TOKENS, Request, Trace, TraceError, read
from tests.support.eviction_traffic import with_conversation
from tests.support.traces import conversation, stream


def line(at: float = 0, tokens: Any = 1300, ids: Any = (0, 7, 8), **more: Any) -> str:
    fields = {"timestamp": at, "input_length": tokens, "output_length": 9, "hash_ids": ids}
    return json.dumps(fields | more) + "\n"


def found(text: str | bytes, **how: Any) -> Trace:
    return read(stream(text), "t.jsonl", **how)


def shape(trace: Trace) -> list[tuple[float, int, list[int]]]:
    return [
        (now, tokens, list(chain))
        for now, tokens, chain in zip(trace.times_s, trace.tokens, trace.chains(), strict=True)
    ]


def test_a_line_is_a_request_of_full_blocks() -> None:
    trace = found(line(500) + line(1500, tokens=1536, ids=[0, 7, 9]))
    assert trace.block_tokens == BLOCK_TOKENS == 512
    assert shape(trace) == [(0.0, 1300, [0, 1]), (1.0, 1536, [0, 1, 2])]
    assert trace.distinct == 3
    assert trace.keys()[0] == trace.keys()[1][:2]


def test_the_partial_last_block_can_be_had() -> None:
    assert shape(found(line(), partial=True)) == [(0.0, 1300, [0, 1, 2])]


def test_requests_are_put_in_the_order_of_their_times() -> None:
    text = line(3000) + line(1000, tokens=512, ids=[4]) + line(1000, tokens=512, ids=[3])
    assert shape(found(text)) == [(0.0, 512, [0]), (0.0, 512, [1]), (2.0, 1300, [2, 3])]


def test_gzip_and_blank_lines_are_read() -> None:
    text = line() + "\n" + line(1)
    assert shape(found(gzip.compress(text.encode()))) == shape(found(text))


def test_a_line_may_say_how_large_its_blocks_are() -> None:
    trace = found(line(tokens=40, ids=[1, 2], block_tokens=16))
    assert trace.block_tokens == 16
    assert shape(trace) == [(0.0, 40, [0, 1])]
    assert found(line(tokens=40, ids=[1, 2]), block_tokens=20).block_tokens == 20
    text = line(tokens=40, ids=[1, 2], block_tokens=16)
    assert found(text, block_tokens=20).block_tokens == 20  # who asks knows better


def test_a_block_that_is_just_full_may_be_left_out() -> None:
    assert shape(found(line(tokens=1024, ids=[1]))) == [(0.0, 1024, [0])]


def test_a_line_may_say_what_is_done_with() -> None:
    trace = found(line(done=1) + line(done=0) + line(done=3) + line())
    assert list(trace.done) == [1, 0, 3, 2]  # of two full blocks each


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        ("7", "7 is no object"),
        ('{"timestamp": 1}', "lacks input_length, hash_ids"),
        (line(at=math.nan), "timestamp is NaN; it is a number of ms"),
        (line(at=True), "timestamp is true"),
        (line(tokens="many"), 'input_length is "many"; it is a number of tokens from 0'),
        (line(tokens=-1), "input_length is -1"),
        (line(tokens=1.5), "input_length is 1.5"),
        (line(ids="abc"), 'hash_ids is "abc"; it is a list of whole numbers'),
        (line(ids=[1, 2, "c"]), 'hash_ids is [1, 2, "c"]'),
        (line(ids=[1, True, 2]), "hash_ids is [1, true, 2]"),
        (line(ids=list(range(40))), "hash_ids has 40 blocks, and input_length is 1300 tokens"),
        (line(ids=[1]), "which is 3 blocks of 512; is that the block size of this trace?"),
        (line(ids=[1, 2, 1]), "hash_ids has a number twice"),
        (line(done=4), "done is 4; it is the place in hash_ids, 0 to 3, from which on"),
        (line(done=True), "done is true"),
        (line(block_tokens=0), "block_tokens is 0; it is a number of tokens from 1"),
        (line(tokens=40, ids=[1, 2], block_tokens=16), "of 16 tokens, and were of 512 before"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(wrong: str | bytes, said: str) -> None:
    raw = wrong.encode() if isinstance(wrong, str) else wrong
    with pytest.raises(TraceError) as refused:
        found(line().encode() + b"\n" + raw)
    assert str(refused.value).startswith("t.jsonl, line 3: ")
    assert said in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_trace_without_a_request_is_refused() -> None:
    with pytest.raises(TraceError, match=r"t\.jsonl: has no request; a line is {"):
        found("\n\n")


def test_a_file_cut_short_is_refused() -> None:
    packed = gzip.compress(line().encode() * 1000)
    with pytest.raises(TraceError, match=r"t\.jsonl: cannot be read after line \d+: "):
        found(packed[:-20])
    with pytest.raises(TraceError, match="cannot be read"):
        found(packed[:20] + b"?" * 40)


def test_no_requests_are_a_trace() -> None:
    assert len(Trace.of([])) == 0
    assert shape(Trace.of([Request(5.0, 3, [9])])) == [(0.0, 3, [])]


@with_conversation
def test_the_conversation() -> None:
    whole, full = conversation(partial=True), conversation()
    assert (len(whole), len(whole.blocks), whole.distinct) == (12_031, 288_500, 182_790)
    assert (len(full), len(full.blocks), full.distinct) == (12_031, 276_491, 170_899)
    assert whole.times_s[-1] == pytest.approx(3537, abs=1)
