"""Hints with a request: they reach L1 when it has ended, and no wrong one does harm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.hints import HintReader
from tests.support.played_engine import BLOCK, PlayedEngine, Request, opened

pytestmark = pytest.mark.engine


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedEngine]:
    engine = opened(monkeypatch, 8)
    yield engine
    engine.side.close()


def asked(name: str, kvcache: object = None) -> Request:
    params = None if kvcache is None else {"kvcache": kvcache}
    return Request(name, 4 * BLOCK, kv_transfer_params=params)


def test_a_conversation_that_is_done_makes_room_for_others(played: PlayedEngine) -> None:
    first, over = asked("first"), asked("over", {"done": True})
    played.keep(first, [1, 2, 3, 4])
    played.keep(over, [5, 6, 7, 8])
    played.keep(asked("next"), [9, 10, 11, 12])
    assert played.held(first) == [True] * 4
    assert played.held(over) == [False] * 4


def test_what_is_kept_stays(played: PlayedEngine) -> None:
    first, other = asked("first", {"keep": 60, "soon": True}), asked("other")
    played.keep(first, [1, 2, 3, 4])
    played.keep(other, [5, 6, 7, 8])
    played.keep(asked("next"), [9, 10, 11, 12])
    assert played.held(first)[:2] == [True] * 2  # a quarter of the slots


@pytest.mark.parametrize(
    ("given", "says"),
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
def test_what_is_not_understood_is_said_once_and_does_nothing(
    played: PlayedEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    given: Any,
    says: str,
) -> None:
    hinted: list[object] = []
    monkeypatch.setattr(played.stack, "hint", lambda *what, **_: hinted.append(what))
    for turn in range(3):
        played.keep(asked(f"{turn}", given), [1, 2, 3, 4])
    assert [says in record.message for record in caplog.records] == [True]
    assert not hinted


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": True}, {"kvcache": {}}])
def test_no_hint_is_none(played: PlayedEngine, params: dict[str, Any] | None) -> None:
    request = Request("a", 2 * BLOCK, kv_transfer_params=params)
    assert HintReader().read(request) == {}
    played.keep(request, [1, 2])
