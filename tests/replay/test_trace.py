"""The trace format: what is read, in which order, and which lines are refused."""

import gzip
import json
import math
from typing import Any

import pytest

from kvcache.replay.trace import BLOCK_TOKENS, Request, Trace, TraceError, read
from tests.support.traces import conversation, needs_conversation, open_stream


def line(at: float = 0, tokens: Any = 1300, ids: Any = (0, 7, 8), **more: Any) -> str:
    fields = {"timestamp": at, "input_length": tokens, "output_length": 9, "hash_ids": ids}
    return json.dumps(fields | more) + "\n"


def parse(text: str | bytes, **options: Any) -> Trace:
    return read(open_stream(text), "t.jsonl", **options)


def requests_of(trace: Trace) -> list[tuple[float, int, list[int]]]:
    return [
        (now, tokens, list(chain))
        for now, tokens, chain in zip(trace.times_s, trace.tokens, trace.chains(), strict=True)
    ]


def test_read_keeps_full_blocks() -> None:
    trace = parse(line(500) + line(1500, tokens=1536, ids=[0, 7, 9]))
    assert trace.block_tokens == BLOCK_TOKENS == 512
    assert requests_of(trace) == [(0.0, 1300, [0, 1]), (1.0, 1536, [0, 1, 2])]
    assert trace.distinct == 3
    assert trace.keys()[0] == trace.keys()[1][:2]


def test_read_with_partial_keeps_the_last_block() -> None:
    assert requests_of(parse(line(), partial=True)) == [(0.0, 1300, [0, 1, 2])]


def test_read_sorts_requests_by_time() -> None:
    text = line(3000) + line(1000, tokens=512, ids=[4]) + line(1000, tokens=512, ids=[3])
    assert requests_of(parse(text)) == [(0.0, 512, [0]), (0.0, 512, [1]), (2.0, 1300, [2, 3])]


def test_read_accepts_gzip_and_blank_lines() -> None:
    text = line() + "\n" + line(1)
    assert requests_of(parse(gzip.compress(text.encode()))) == requests_of(parse(text))


def test_read_takes_block_tokens_from_the_caller_or_the_line() -> None:
    trace = parse(line(tokens=40, ids=[1, 2], block_tokens=16))
    assert trace.block_tokens == 16
    assert requests_of(trace) == [(0.0, 40, [0, 1])]
    assert parse(line(tokens=40, ids=[1, 2]), block_tokens=20).block_tokens == 20
    text = line(tokens=40, ids=[1, 2], block_tokens=16)
    assert parse(text, block_tokens=20).block_tokens == 20


def test_read_accepts_a_line_without_a_last_block_that_is_just_full() -> None:
    assert requests_of(parse(line(tokens=1024, ids=[1]))) == [(0.0, 1024, [0])]


def test_read_keeps_hints() -> None:
    trace = parse(line(done=1) + line(done=0) + line(done=3) + line())
    assert list(trace.done) == [1, 0, 3, 2]  # each has two full blocks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        ("7", "7 is not an object"),
        ('{"timestamp": 1}', "lacks input_length, hash_ids"),
        (line(at=math.nan), "timestamp is NaN; it must be a number of ms"),
        (line(at=True), "timestamp is true"),
        (line(tokens="many"), 'input_length is "many"; it must be a number of tokens, at least 0'),
        (line(tokens=-1), "input_length is -1"),
        (line(tokens=1.5), "input_length is 1.5"),
        (line(ids="abc"), 'hash_ids is "abc"; it must be a list of whole numbers'),
        (line(ids=[1, 2, "c"]), 'hash_ids is [1, 2, "c"]'),
        (line(ids=[1, True, 2]), "hash_ids is [1, true, 2]"),
        (line(ids=list(range(40))), "hash_ids has 40 blocks, but input_length is 1300 tokens"),
        (line(ids=[1]), "which are 3 blocks of 512; is that the block size of this trace?"),
        (line(ids=[1, 2, 1]), "hash_ids repeats a number"),
        (line(done=4), "done is 4; it must be the position in hash_ids, 0 to 3, of the first"),
        (line(done=True), "done is true"),
        (line(block_tokens=0), "block_tokens is 0; it must be a number of tokens, at least 1"),
        (
            line(tokens=40, ids=[1, 2], block_tokens=16),
            "block_tokens is 16, but 512 in the lines before",
        ),
    ],
)
def test_read_of_a_wrong_line_raises_with_its_number(wrong: str | bytes, message: str) -> None:
    raw = wrong.encode() if isinstance(wrong, str) else wrong
    with pytest.raises(TraceError) as refused:
        parse(line().encode() + b"\n" + raw)
    assert str(refused.value).startswith("t.jsonl, line 3: ")
    assert message in str(refused.value)
    assert len(str(refused.value)) < 300


def test_read_of_a_trace_without_requests_raises() -> None:
    with pytest.raises(TraceError, match=r"t\.jsonl: has no request; a line is {"):
        parse("\n\n")


def test_read_of_a_damaged_gzip_file_raises() -> None:
    packed = gzip.compress(line().encode() * 1000)
    with pytest.raises(TraceError, match=r"t\.jsonl: cannot be read after line \d+: "):
        parse(packed[:-20])
    with pytest.raises(TraceError, match="cannot be read"):
        parse(packed[:20] + b"?" * 40)


def test_trace_of_no_requests_is_empty() -> None:
    assert len(Trace.of([])) == 0
    assert requests_of(Trace.of([Request(5.0, 3, [9])])) == [(0.0, 3, [])]


@needs_conversation
def test_read_of_the_conversation() -> None:
    whole, full = conversation(partial=True), conversation()
    assert (len(whole), len(whole.blocks), whole.distinct) == (12_031, 288_500, 182_790)
    assert (len(full), len(full.blocks), full.distinct) == (12_031, 276_491, 170_899)
    assert whole.times_s[-1] == pytest.approx(3537, abs=1)
