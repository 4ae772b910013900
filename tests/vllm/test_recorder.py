"""With KVCACHE_RECORD, a request is one line of the trace, however often it is matched."""

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from kvcache.replay.trace import read
from tests.support.played_engine import BLOCK, Request, opened

pytestmark = pytest.mark.engine


def test_recorder_writes_one_line_for_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "asked.jsonl"
    monkeypatch.setenv("KVCACHE_RECORD", str(path))
    played = opened(monkeypatch, 32)
    tokens = 3 * BLOCK + 5
    for name in ("a", "b"):
        request = Request(name, tokens, name="same", num_prompt_tokens=tokens)
        played.side.add_request(request)
        for own in (0, BLOCK, 0):  # vLLM asks again while the request waits
            played.side.matched_tokens(request, own)
        played.keep(request, [1, 2, 3, 4])
    played.side.close()
    with path.open("rb") as file:
        trace = read(file, path.name)
    assert trace.block_tokens == BLOCK
    assert list(trace.tokens) == [tokens, tokens]
    assert [list(chain) for chain in trace.chains()] == [[0, 1, 2], [0, 1, 2]]
