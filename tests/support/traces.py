"""Traces for tests of replay and of eviction policies, and how to play them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path

import pytest

from kvcache.replay.simulate import SimulatedTiers
from kvcache.replay.trace import Request, Trace, read

TRACE = Path(
    os.environ.get("KVCACHE_TRACE")
    or Path(__file__).resolve().parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
)
needs_conversation = pytest.mark.skipif(
    not TRACE.exists(), reason=f"there is no trace at {TRACE}; KVCACHE_TRACE can name one"
)


@cache
def conversation(*, partial: bool = False) -> Trace:
    """Return Mooncake's open conversation trace: 59 minutes."""
    with TRACE.open("rb") as file:
        return read(file, TRACE.name, partial=partial)


def trace_of(*chains: Sequence[int], every_s: float = 1.0) -> Trace:
    """Return a trace of these chains of blocks of one token, one each ``every_s``."""
    return Trace.of(
        [Request(at * every_s, len(ids), ids) for at, ids in enumerate(chains)], block_tokens=1
    )


def open_stream(text: str | bytes) -> BufferedReader:
    """Return an open file with ``text``."""
    raw = text.encode() if isinstance(text, str) else text
    return BufferedReader(BytesIO(raw))


def part(trace: Trace, start: int, stop: int) -> Trace:
    """Return the requests from ``start`` to ``stop``, at the same times and with the same keys."""
    first, last = trace.ends[start], trace.ends[stop]
    ends = trace.ends[start : stop + 1]
    for at in range(len(ends)):
        ends[at] -= first
    return replace(
        trace,
        times_s=trace.times_s[start:stop],
        tokens=trace.tokens[start:stop],
        ends=ends,
        blocks=trace.blocks[first:last],
        done=trace.done[start:stop],
    )


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """Return the first half of the requests, and the second."""
    middle = len(trace) // 2
    return part(trace, 0, middle), part(trace, middle, len(trace))


def slowed(trace: Trace, factor: float) -> Trace:
    """Return the same requests at times multiplied by ``factor``."""
    times_s = trace.times_s[:]
    for at in range(len(times_s)):
        times_s[at] *= factor
    return replace(trace, times_s=times_s)


def play(tiers: SimulatedTiers, trace: Trace) -> float:
    """Serve all requests of ``trace``; returns the share of blocks found, in percent."""
    found = 0
    for now, chain in zip(trace.times_s, trace.keys(), strict=True):
        found += tiers.request(chain, now)
    return 100 * found / max(1, len(trace.blocks))
