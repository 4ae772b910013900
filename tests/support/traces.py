"""What the tests of replay share: the trace of the conversation, and traces written by hand."""

from collections.abc import Sequence
from io import BufferedReader, BytesIO

from kvcache.replay.trace import Request, Trace, read
from tests.support.eviction_traffic import TRACE


def chains(*asked: Sequence[int], every_s: float = 1.0) -> Trace:
    """A trace of blocks of one token, of these chains, one each ``every_s``."""
    return Trace.of(
        [Request(at * every_s, len(ids), ids) for at, ids in enumerate(asked)], block_tokens=1
    )


def stream(text: str | bytes) -> BufferedReader:
    """An open file that has ``text``."""
    raw = text.encode() if isinstance(text, str) else text
    return BufferedReader(BytesIO(raw))


def conversation(*, partial: bool = False) -> Trace:
    """The first 59 minutes of Mooncake's open trace of conversations."""
    with TRACE.open("rb") as file:
        return read(file, TRACE.name, partial=partial)
