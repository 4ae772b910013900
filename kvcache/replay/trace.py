"""Traces: who asked for which blocks, and when. The format is Mooncake's, one JSON object a line::

    {"timestamp": 1200, "input_length": 1300, "output_length": 52, "hash_ids": [0, 7, 8]}

``timestamp`` is in milliseconds, if the caller does not give another unit, lengths are in tokens,
and ``hash_ids`` has one number for each block of the input, the last of which may be partial. A
number stands for a whole prefix: the same number means the same tokens up to there. A line may say
of how many tokens its blocks are (``block_tokens``); Mooncake's traces do not, and theirs have 512.
It may say that, when the request has ended, its blocks from one on will not be used again
(``done``, 0 for all of them), which is the hint ``stack.hint(keys[done:], done=True)``.

Always true of a ``Trace``:

* Requests are in the order of their times; the first is at 0.
* Blocks are numbered from 0 in order of first sight, and no chain has a block twice.
* It is a few flat arrays, so that handing it to another process costs a copy.

A file is read to a limit, because a small gzip may be of any length unpacked.
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

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Units of ``timestamp``, and how many of them are a second."""
LINE_NBYTES = 32 << 20
NBYTES = 4 << 30
LINES = 10_000_000
BLOCKS = 100_000_000
"""What a trace has at most: bytes of a line, and bytes, lines and blocks of all requests."""
USUAL_REQUESTS_PER_S = (1 / 300, 300.0)
"""Mean rates that traces have; beyond them the unit of ``timestamp`` is probably another one."""
ENOUGH = 100  # requests, for a rate to say something

BLOCK_TOKENS = 512  # where neither the trace nor the caller says
EXAMPLE = '{"timestamp": 1200, "input_length": 1300, "hash_ids": [0, 7, 8]}'


class TraceError(ValueError):
    """A trace cannot be used; says which line is wrong, what it has, and what is allowed."""


class Request(NamedTuple):
    """A prompt of ``tokens`` that came at ``time_s``; ``ids`` has one number per block of it.

    From the block ``done`` on it is said to be done with, at its end; ``None``: nothing is said.
    """

    time_s: float
    tokens: int
    ids: Sequence[int]
    done: int | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order. Chain ``n`` is ``blocks[ends[n] : ends[n + 1]]``.

    Its blocks from ``done[n]`` on are said to be done with; it has no such block if nothing is.
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
        """A trace of ``requests``, in the order of their times.

        Args:
            requests: in any order; those of one time stay as they are.
            block_tokens: tokens of a block.
            partial: keep a last block that is not full. An engine like vLLM does not.
        """
        ordered = sorted(requests, key=itemgetter(0))
        first_s = ordered[0].time_s if ordered else 0.0
        numbers: dict[int, int] = {}
        blocks = array("q")
        lengths = [0]
        done = array("q")
        for request in ordered:
            kept = request.ids if partial else request.ids[: request.tokens // block_tokens]
            lengths.append(len(kept))
            done.append(len(kept) if request.done is None else request.done)
            blocks.extend([numbers.setdefault(block, len(numbers)) for block in kept])
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
        """Mean rate; None of too few requests. Infinite if all have one time."""
        if len(self) < ENOUGH:
            return None
        return len(self) / self.times_s[-1] if self.times_s[-1] else math.inf

    def chains(self) -> Iterator[array[int]]:
        """The blocks of each request."""
        for start, end in zip(self.ends, islice(self.ends, 1, None), strict=False):
            yield self.blocks[start:end]

    def keys(self) -> list[list[bytes]]:
        """The same as the keys that an index takes; equal blocks are one object."""
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
        name: what errors call it.
        block_tokens: tokens of a block; ``None`` is what the trace says, else 512.
        partial: keep a last block that is not full.
        unit: of ``timestamp``, one of ``UNITS``.

    Raises:
        TraceError: at the first line that is not as above, when there is none, or when there is
            more than a limit allows.
    """
    said: int | None = None
    requests: list[Request] = []
    number = nbytes = blocks = 0
    try:
        packed = stream.peek(2)[:2] == b"\x1f\x8b"
        lines = gzip.GzipFile(fileobj=stream) if packed else stream
        while line := lines.readline(LINE_NBYTES + 1):
            number += 1
            nbytes += len(line)
            if len(line) > LINE_NBYTES:
                raise TraceError(f"has more than {format_size(LINE_NBYTES)}")
            if number > LINES or nbytes > NBYTES or blocks > BLOCKS:
                raise TraceError(
                    f"is too much: a trace has at most {LINES:,} lines, {BLOCKS:,} blocks and "
                    f"{format_size(NBYTES)}; replay a part of it"
                )
            if not line.strip():
                continue
            request, of_line = _request(line, block_tokens, unit)
            if said is not None and of_line != said:
                raise TraceError(f"blocks are of {of_line} tokens, and were of {said} before")
            said = of_line
            requests.append(request)
            blocks += len(request.ids)
    except RecursionError:
        raise TraceError(f"{name}, line {number}: not JSON (nested too deeply)") from None
    except TraceError as error:
        raise TraceError(f"{name}, line {number}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{name}: cannot be read after line {number}: {error}") from error
    if said is None:
        raise TraceError(f"{name}: has no request; a line is {EXAMPLE}")
    return Trace.of(requests, said, partial=partial)


def _request(line: bytes, block_tokens: int | None, unit: str) -> tuple[Request, int]:
    """One line, and the tokens of its blocks."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"not JSON ({error}); a line is {EXAMPLE}") from None
    if not isinstance(given, dict):
        raise TraceError(f"{_shown(given)} is no object; a line is {EXAMPLE}")
    if missing := [f for f in ("timestamp", "input_length", "hash_ids") if f not in given]:
        raise TraceError(f"lacks {', '.join(missing)}; a line is {EXAMPLE}")
    at, tokens, ids = given["timestamp"], given["input_length"], given["hash_ids"]
    if type(at) not in (int, float) or not abs(at) < 2**63:  # nor is NaN below it
        raise TraceError(f"timestamp is {_shown(at)}; it is a number of {unit}")
    size = block_tokens or given.get("block_tokens", BLOCK_TOKENS)
    for field, value, least in (("input_length", tokens, 0), ("block_tokens", size, 1)):
        if type(value) is not int or not least <= value < 2**31:
            raise TraceError(f"{field} is {_shown(value)}; it is a number of tokens from {least}")
    if type(ids) is not list or any(type(block) is not int for block in ids):
        raise TraceError(f"hash_ids is {_shown(ids)}; it is a list of whole numbers")
    # An engine that leaves one token to compute does not ask for a last block that is just full.
    if not (tokens - 1) // size <= len(ids) <= -(-tokens // size):
        raise TraceError(
            f"hash_ids has {len(ids)} blocks, and input_length is {tokens} tokens, which is "
            f"{-(-tokens // size)} blocks of {size}; is that the block size of this trace?"
        )
    if len(set(ids)) < len(ids):
        raise TraceError("hash_ids has a number twice; a number stands for all up to its block")
    done = given.get("done")
    if done is not None and (type(done) is not int or not 0 <= done <= len(ids)):
        raise TraceError(
            f"done is {_shown(done)}; it is the place in hash_ids, 0 to {len(ids)}, from which on "
            "blocks are not used again"
        )
    return Request(at / UNITS[unit], tokens, ids, done), size


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
