"""What goes wrong between the steps of a disk tier's calls, and between its calls."""

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE
from kvcache.tiers.disk import tier as tier_module
from tests.tiers.test_disk import blocks, held, opened


@pytest.mark.parametrize("verb", ["store", "load"])
def test_nothing_is_under_way_when_a_call_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The first block of a call breaks; the second is still on its way."""
    keys = keys_of("a", 2)
    over, late = threading.Event(), []
    real = {"store": os.pwritev, "load": os.preadv}[verb]

    def slow(*of: Any) -> int:
        over.wait(0.3)
        late.append(over.is_set())
        return real(*of)

    broken = memoryview(bytearray(PAGE))[::-1]  # not contiguous: nobody's fault but the caller's
    whole = memoryview(mmap.mmap(-1, PAGE))
    with closing(opened(tmp_path)) as tier:
        if verb == "load":
            tier.store(keys, blocks(keys))
        monkeypatch.setattr(os, "pwritev" if verb == "store" else "preadv", slow)
        with pytest.raises((BufferError, TypeError, ValueError)):
            getattr(tier, verb)(keys, [broken, whole])
        over.set()
        assert late == [False]
        assert tier._index.pinned_slots == 0
        tier._index.check()


def test_nothing_is_under_way_when_a_call_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, over, late, real = keys_of("a", 2), threading.Event(), [], os.pwritev
    left = ["interrupt"]

    def slow(*of: Any) -> int:
        over.wait(0.3)
        late.append(over.is_set())
        return real(*of)

    def interrupted(futures: Any) -> None:
        if left:
            raise KeyboardInterrupt(left.pop())
        wait(futures)

    with closing(opened(tmp_path)) as tier:
        monkeypatch.setattr(os, "pwritev", slow)
        monkeypatch.setattr(tier_module, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tier.store(keys, blocks(keys))
        over.set()
        assert late == [False, False]
        assert tier._index.pinned_slots == 0
        assert held(tier, keys) == [True] * 2  # what was written is there


@pytest.mark.parametrize("verb", ["load", "store", "remove"])
def test_files_are_closed_when_the_last_call_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Else what a call still writes could go to whatever file is opened next."""
    keys, new = keys_of("a", 2), keys_of("new", 2)
    tier = opened(tmp_path)
    tier.store(keys, blocks(keys))
    inside, closed, found = threading.Event(), threading.Event(), []

    def meanwhile(real: Any) -> Any:
        def call(*of: Any) -> Any:
            inside.set()
            closed.wait(0.3)
            found.append(closed.is_set())
            return real(*of)

        return call

    def close() -> None:
        inside.wait(10)
        tier.close()
        closed.set()

    monkeypatch.setattr(os, "preadv", meanwhile(os.preadv))
    for name in ("clear", "write"):
        monkeypatch.setattr(tier._records, name, meanwhile(getattr(tier._records, name)))
    with ThreadPoolExecutor(1) as other:
        closer = other.submit(close)
        match verb:
            case "load":
                assert held(tier, keys) == [True] * 2
            case "store":
                assert tier.store(new, blocks(new)) == [False] * 2  # as it has closed by then
            case _:
                tier.remove(keys)
        closer.result()
    assert found
    assert not any(found)
    with closing(opened(tmp_path)) as again:
        assert held(again, keys) == [verb != "remove"] * 2
        assert held(again, new) == [verb == "store"] * 2


def test_a_disk_that_hangs_does_not_hold_up_who_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, inside, go, real = keys_of("a", 1), threading.Event(), threading.Event(), os.preadv
    tier = opened(tmp_path)
    tier.store(keys, blocks(keys))

    def hang(*of: Any) -> int:
        inside.set()
        go.wait(10)
        return real(*of)

    monkeypatch.setattr(tier_module, "_CLOSE_S", 0.01)
    monkeypatch.setattr(os, "preadv", hang)
    with ThreadPoolExecutor(1) as other:
        reader = other.submit(held, tier, keys)
        inside.wait(10)
        tier.close()
        assert tier.contains(keys) == [False]
        go.set()
        assert reader.result() == [True]  # its files were not closed under it
    tier._pool.close(10)
    tier._files.close()


def test_threads_that_are_no_more_to_be_had_are_a_decline(tmp_path: Path) -> None:
    """As when a call comes while the tier closes."""
    keys, new = keys_of("a", 2), keys_of("new", 2)
    with closing(opened(tmp_path)) as tier:
        tier.store(keys, blocks(keys))
        tier._pool.close(10)
        assert held(tier, keys) == [False] * 2
        assert tier.store(new, blocks(new)) == [False] * 2
        assert tier._index.pinned_slots == 0
        tier._index.check()


def test_what_is_being_read_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = keys_of("old", 1), keys_of("new", 1)
    real, answers = os.preadv, []
    with closing(opened(tmp_path, 1)) as tier:
        tier.store(old, blocks(old))

        def read(*of: Any) -> int:
            answers.append(writer.submit(tier.store, new, blocks(new)).result(10))
            return real(*of)

        with ThreadPoolExecutor(1) as writer:
            monkeypatch.setattr(os, "preadv", read)
            assert held(tier, old) == [True]
        assert answers == [[False]]


def test_a_record_is_cleared_before_its_block_and_written_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = keys_of("old", 1), keys_of("new", 1)
    steps: list[str] = []
    with closing(opened(tmp_path, 1)) as tier:
        tier.store(old, blocks(old))

        def step(name: str, real: Any) -> Any:
            def call(*of: Any) -> Any:
                steps.append(name)
                return real(*of)

            return call

        monkeypatch.setattr(os, "pwritev", step("block", os.pwritev))
        for name in ("clear", "write"):
            real = getattr(tier._records, name)
            monkeypatch.setattr(tier._records, name, step(name, real))
        assert tier.store(new, blocks(new)) == [True]
    assert steps == ["clear", "block", "write"]
