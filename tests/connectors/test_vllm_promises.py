"""When a hit comes with the step, and when later; and what a request that waited brings back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Acks
from tests.connectors.played import BLOCK, Played, Request, opened

pytestmark = pytest.mark.engine


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """Four blocks are kept, copies go on beside steps, and a load of a block takes 4 ms."""
    engine = opened(monkeypatch, 32)
    engine.keep(Request("kept", 4 * BLOCK + 1, name="known"), range(5))
    engine.side._promised.beside = True
    engine.side._promised.loaded(1, 0.004)
    yield engine
    engine.side.close()


def known(name: str = "asks", blocks: int = 4) -> Request:
    return Request(name, blocks * BLOCK + 1, name="known")


def others(played: Played) -> Request:
    runs = Request("runs", 10)
    played.admit(runs, [9])
    played.step((runs, 10))
    return runs


def test_a_long_load_comes_later_where_others_run(played: Played) -> None:
    request = known()
    others(played)
    assert played.admit(request, [10, 11, 12, 13]) == 4 * BLOCK
    played._new.clear()  # it is not scheduled
    step = played.step()
    [load] = step.loads
    assert (load.blocks, load.awaited_by) == ([10, 11, 12, 13], "asks")
    played.ack(load)
    # It is over: vLLM takes the request, with the tokens that it has now.
    request.blocks.append(14)
    played.side.admitted(request, (request.blocks,), 0)
    played._new = [request]
    step = played.step((request, 1))
    assert not step.loads
    assert not step.stores  # all is held
    played.side.finished(request)
    assert not played.side.copying


@pytest.mark.parametrize("why", ["alone", "short", "in the step"])
def test_other_loads_come_with_the_step(played: Played, why: str) -> None:
    if why != "alone":
        others(played)
    played.side._promised.beside = why != "in the step"
    request = known(blocks=1 if why == "short" else 4)
    assert played.side.matched_tokens(request, 0)
    assert not played.side.comes_later(request)
    played.side.finished(request)


def test_who_is_preempted_after_a_load_is_looked_up_again(played: Played) -> None:
    request = known()
    others(played)
    played.admit(request, [10, 11, 12, 13])
    played._new.clear()
    [load] = played.step().loads
    played.ack(load)
    played.side.admitted(request, (request.blocks,), 0)
    request.num_computed_tokens = 0
    assert played.admit(request, [20, 21, 22, 23], resumed=True) == 4 * BLOCK
    played._resumed.clear()
    [again] = played.step().loads
    assert again.blocks == [20, 21, 22, 23]
    played.ack(again)
    played.side.finished(request)


def test_one_that_is_gone_leaves_nothing(played: Played) -> None:
    request = known()
    runs = others(played)
    played.admit(request, [10, 11, 12, 13])
    played._new.clear()
    [load] = played.step().loads
    played.side.finished(request)
    assert played.side.copying  # its slots are read until the load is over
    assert played.l1.pinned_slots == 4
    played.side.acked(Acks({load.job: 2}))
    played.side.finished(runs)
    assert played.nothing_is_open()
