"""Hints of a request reach L1 when it has ended; an invalid hint is ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.scheduler.hints import HintReader
from tests.support.played_engine import BLOCK, PlayedEngine, Request, opened

pytestmark = pytest.mark.engine


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    engine = opened(monkeypatch, 8)
    yield engine
    engine.side.close()


def request_of(name: str, kvcache: object = None) -> Request:
    params = None if kvcache is None else {"kvcache": kvcache}
    return Request(name, 4 * BLOCK, kv_transfer_params=params)


def test_hint_done_evicts_the_conversation_first(played: PlayedEngine) -> None:
    first, over = request_of("first"), request_of("over", {"done": True})
    played.keep(first, [1, 2, 3, 4])
    played.keep(over, [5, 6, 7, 8])
    played.keep(request_of("next"), [9, 10, 11, 12])
    assert played.held(first) == [True] * 4
    assert played.held(over) == [False] * 4


def test_hint_keep_protects_a_quarter_of_the_slots(played: PlayedEngine) -> None:
    first, other = request_of("first", {"keep": 60, "soon": True}), request_of("other")
    played.keep(first, [1, 2, 3, 4])
    played.keep(other, [5, 6, 7, 8])
    played.keep(request_of("next"), [9, 10, 11, 12])
    assert played.held(first)[:2] == [True] * 2  # two of eight slots


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (7, "it is a int, not an object"),
        ({"keep": -1}, "keep takes seconds"),
        ({"keep": 1e9}, "3600 at most"),
        ({"keep": True}, "keep takes seconds"),
        ({"done": "yes"}, "done takes true or false"),
        ({"forget": True}, "the hints are done, keep and soon"),
        ({"done": True, "keep": 5}, "done excludes keep and soon"),
    ],
)
def test_hint_that_is_invalid_is_logged_once_and_ignored(
    played: PlayedEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    given: Any,
    reason: str,
) -> None:
    hinted: list[object] = []
    monkeypatch.setattr(played.stack, "hint", lambda *what, **_: hinted.append(what))
    for turn in range(3):
        played.keep(request_of(f"{turn}", given), [1, 2, 3, 4])
    assert [reason in record.message for record in caplog.records] == [True]
    assert not hinted


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": True}, {"kvcache": {}}])
def test_hint_absent_or_empty_is_no_hint(
    played: PlayedEngine, params: dict[str, Any] | None
) -> None:
    request = Request("a", 2 * BLOCK, kv_transfer_params=params)
    assert HintReader().read(request) == {}
    played.keep(request, [1, 2])
