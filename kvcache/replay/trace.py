"""Traces of requests. The format is Mooncake's, one JSON object per line::

    {"timestamp": 1200, "input_length": 1300, "output_length": 52, "hash_ids": [0, 7, 8]}

``timestamp`` is in milliseconds unless the caller names another unit, and lengths are in tokens.
``hash_ids`` has one number per block of the input; the last block may be partial. A number stands
for a whole prefix: the same number means the same tokens up to the end of its block. Two fields are
optional. ``block_tokens`` is the size of the line's blocks; without it they have 512 tokens, as in
Mooncake's traces. ``done`` is a hint for the end of the request: its blocks from this position on
will not be used again (``stack.hint(keys[done:], done=True)``).

Invariants of a ``Trace``:

* Requests are in the order of their times; the first is at 0.
* Blocks are numbered from 0 in the order of their first use, and no chain has a block twice.
* It consists of a few flat arrays, so that sending it to another process is one copy.

A file is read up to a limit, because a small gzip file may unpack to any length.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate, islice
from operator import itemgetter
from typing import NamedTuple

from kvcache.sizes import format_size

TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Units of ``timestamp``, and how many of each are a second."""
MAX_LINE_NBYTES = 32 << 20
MAX_NBYTES = 4 << 30
MAX_LINES = 10_000_000
MAX_BLOCKS = 100_000_000
"""Limits of a trace: bytes of one line; bytes, lines and blocks of the whole trace, unpacked."""
PLAUSIBLE_REQUESTS_PER_S = (1 / 300, 300.0)
"""Mean rates of real traces. Beyond them, ``timestamp`` is probably in another unit."""
MIN_RATE_REQUESTS = 100
"""A shorter trace has no mean rate: its rate may be anything."""

BLOCK_TOKENS = 512
"""Tokens of a block if neither the trace nor the caller gives a number: Mooncake's."""
_EXAMPLE = '{"timestamp": 1200, "input_length": 1300, "hash_ids": [0, 7, 8]}'


class TraceError(ValueError):
    """A trace is invalid; the message has the line, its content, and the allowed values."""


class Request(NamedTuple):
    """A request of a trace.

    Attributes:
        time_s: when it arrived.
        tokens: tokens of its prompt.
        ids: a number for each block of the prompt.
        done: the first block of those that will not be used again; ``None`` without a hint.
    """

    time_s: float
    tokens: int
    ids: Sequence[int]
    done: int | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order. The blocks of request ``n`` are ``blocks[ends[n] : ends[n + 1]]``.

    Attributes:
        block_tokens: tokens of a block.
        times_s: when each request arrived, in seconds after the first.
        tokens: tokens of each prompt.
        ends: the start of each request's blocks in ``blocks``, and the end of the last ones.
        blocks: the blocks of all requests.
        distinct: number of distinct blocks.
        done: for each request, the first of its blocks that will not be used again; the number of
            its blocks if there is none.
    """

    block_tokens: int
    times_s: array[float]
    tokens: array[int]
    ends: array[int]
    blocks: array[int]
    distinct: int
    done: array[int]

    @classmethod
    def of(
        cls, requests: Iterable[Request], block_tokens: int = BLOCK_TOKENS, *, partial: bool = False
    ) -> Trace:
        """Return a trace of ``requests``, sorted by time.

        Args:
            requests: in any order; requests of the same time keep theirs.
            block_tokens: tokens of a block.
            partial: keep a partial last block. An engine like vLLM does not store it.
        """
        ordered = sorted(requests, key=itemgetter(0))
        first_s = ordered[0].time_s if ordered else 0.0
        numbers: dict[int, int] = {}
        blocks = array("q")
        lengths = [0]
        done = array("q")
        for request in ordered:
            ids = request.ids if partial else request.ids[: request.tokens // block_tokens]
            lengths.append(len(ids))
            done.append(len(ids) if request.done is None else request.done)
            blocks.extend([numbers.setdefault(block, len(numbers)) for block in ids])
        return cls(
            block_tokens,
            array("d", [request.time_s - first_s for request in ordered]),
            array("q", [request.tokens for request in ordered]),
            array("q", accumulate(lengths)),
            blocks,
            len(numbers),
            done,
        )

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def requests_per_s(self) -> float | None:
        """Mean rate; ``None`` for few requests, infinite if all have the same time."""
        if len(self) < MIN_RATE_REQUESTS:
            return None
        return len(self) / self.times_s[-1] if self.times_s[-1] else math.inf

    def chains(self) -> Iterator[array[int]]:
        """Yield the blocks of each request."""
        for start, end in zip(self.ends, islice(self.ends, 1, None), strict=False):
            yield self.blocks[start:end]

    def keys(self) -> list[list[bytes]]:
        """Return the chains as keys for an index; equal keys are the same object."""
        names = [b"%d" % number for number in range(self.distinct)]
        return [[names[number] for number in chain] for chain in self.chains()]


def read(
    stream: BufferedReader,
    name: str,
    *,
    block_tokens: int | None = None,
    partial: bool = False,
    unit: str = "ms",
) -> Trace:
    """Read a trace, plain or gzipped, to its end.

    Args:
        stream: the file, open for bytes.
        name: the file's name in error messages.
        block_tokens: tokens of a block; ``None`` takes the trace's number, else 512.
        partial: keep a partial last block.
        unit: of ``timestamp``, one of ``TIME_UNITS``.

    Raises:
        TraceError: at the first line that is not in the format above, if there is no line, or if a
            limit is exceeded.
    """
    trace_block_tokens: int | None = None
    requests: list[Request] = []
    number = nbytes = blocks = 0
    try:
        packed = stream.peek(2)[:2] == b"\x1f\x8b"
        lines = gzip.GzipFile(fileobj=stream) if packed else stream
        while line := lines.readline(MAX_LINE_NBYTES + 1):
            number += 1
            nbytes += len(line)
            if len(line) > MAX_LINE_NBYTES:
                raise TraceError(f"has more than {format_size(MAX_LINE_NBYTES)}")
            if number > MAX_LINES or nbytes > MAX_NBYTES or blocks > MAX_BLOCKS:
                raise TraceError(
                    f"too large: a trace has at most {MAX_LINES:,} lines, {MAX_BLOCKS:,} blocks "
                    f"and {format_size(MAX_NBYTES)}; replay a part of it"
                )
            if not line.strip():
                continue
            request, line_block_tokens = _parse(line, block_tokens, unit)
            if trace_block_tokens is not None and line_block_tokens != trace_block_tokens:
                raise TraceError(
                    f"block_tokens is {line_block_tokens}, but {trace_block_tokens} in the lines "
                    "before"
                )
            trace_block_tokens = line_block_tokens
            requests.append(request)
            blocks += len(request.ids)
    except RecursionError:
        raise TraceError(f"{name}, line {number}: not JSON (nested too deeply)") from None
    except TraceError as error:
        raise TraceError(f"{name}, line {number}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{name}: cannot be read after line {number}: {error}") from error
    if trace_block_tokens is None:
        raise TraceError(f"{name}: has no request; a line is {_EXAMPLE}")
    return Trace.of(requests, trace_block_tokens, partial=partial)


def _parse(line: bytes, block_tokens: int | None, unit: str) -> tuple[Request, int]:
    """Return the request of a line, and the tokens of its blocks."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"not JSON ({error}); a line is {_EXAMPLE}") from None
    if not isinstance(fields, dict):
        raise TraceError(f"{_shortened(fields)} is not an object; a line is {_EXAMPLE}")
    if missing := [f for f in ("timestamp", "input_length", "hash_ids") if f not in fields]:
        raise TraceError(f"lacks {', '.join(missing)}; a line is {_EXAMPLE}")
    timestamp, tokens, ids = fields["timestamp"], fields["input_length"], fields["hash_ids"]
    if type(timestamp) not in (int, float) or not abs(timestamp) < 2**63:  # also excludes NaN
        raise TraceError(f"timestamp is {_shortened(timestamp)}; it must be a number of {unit}")
    size = block_tokens or fields.get("block_tokens", BLOCK_TOKENS)
    for field, value, least in (("input_length", tokens, 0), ("block_tokens", size, 1)):
        if type(value) is not int or not least <= value < 2**31:
            raise TraceError(
                f"{field} is {_shortened(value)}; it must be a number of tokens, at least {least}"
            )
    if type(ids) is not list or any(type(block) is not int for block in ids):
        raise TraceError(f"hash_ids is {_shortened(ids)}; it must be a list of whole numbers")
    # An engine that has to compute the last token does not look up a last block that is just full.
    if not (tokens - 1) // size <= len(ids) <= -(-tokens // size):
        raise TraceError(
            f"hash_ids has {len(ids)} blocks, but input_length is {tokens} tokens, which are "
            f"{-(-tokens // size)} blocks of {size}; is that the block size of this trace?"
        )
    if len(set(ids)) < len(ids):
        raise TraceError("hash_ids repeats a number; a number stands for a whole prefix")
    done = fields.get("done")
    if done is not None and (type(done) is not int or not 0 <= done <= len(ids)):
        raise TraceError(
            f"done is {_shortened(done)}; it must be the position in hash_ids, 0 to {len(ids)}, "
            "of the first block that is not used again"
        )
    return Request(timestamp / TIME_UNITS[unit], tokens, ids, done), size


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
