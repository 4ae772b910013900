"""DiskTier: faults and other calls between the steps of one call."""

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
from tests.support.disk_tiers import blocks_of, load_hits, open_disk


@pytest.mark.parametrize("verb", ["store", "load"])
def test_disk_call_with_bad_buffer_raises_after_all_io_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The first block of the call fails while the second one is still read or written."""
    keys = keys_of("a", 2)
    call_ended, io_after_end = threading.Event(), []
    real = {"store": os.pwritev, "load": os.preadv}[verb]

    def slow(*arguments: Any) -> int:
        call_ended.wait(0.3)
        io_after_end.append(call_ended.is_set())
        return real(*arguments)

    bad = memoryview(bytearray(PAGE))[::-1]  # not contiguous: an error of the caller
    good = memoryview(mmap.mmap(-1, PAGE))
    with closing(open_disk(tmp_path)) as tier:
        if verb == "load":
            tier.store(keys, blocks_of(keys))
        monkeypatch.setattr(os, "pwritev" if verb == "store" else "preadv", slow)
        with pytest.raises((BufferError, TypeError, ValueError)):
            getattr(tier, verb)(keys, [bad, good])
        call_ended.set()
        assert io_after_end == [False]
        assert tier.index.pinned_slots == 0
        tier.index.check()


def test_disk_interrupted_store_raises_after_all_io_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, call_ended, real = keys_of("a", 2), threading.Event(), os.pwritev
    io_after_end: list[bool] = []
    interrupts = ["interrupt"]

    def slow(*arguments: Any) -> int:
        call_ended.wait(0.3)
        io_after_end.append(call_ended.is_set())
        return real(*arguments)

    def interrupted_wait(futures: Any) -> None:
        if interrupts:
            raise KeyboardInterrupt(interrupts.pop())
        wait(futures)

    with closing(open_disk(tmp_path)) as tier:
        monkeypatch.setattr(os, "pwritev", slow)
        monkeypatch.setattr(tier_module, "wait", interrupted_wait)
        with pytest.raises(KeyboardInterrupt):
            tier.store(keys, blocks_of(keys))
        call_ended.set()
        assert io_after_end == [False, False]
        assert tier.index.pinned_slots == 0
        assert load_hits(tier, keys) == [True] * 2  # the writes completed


@pytest.mark.parametrize("verb", ["load", "store", "remove"])
def test_disk_close_waits_for_calls_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A later write could otherwise go to another file with the same descriptor."""
    keys, new = keys_of("a", 2), keys_of("new", 2)
    tier = open_disk(tmp_path)
    tier.store(keys, blocks_of(keys))
    in_call, closed, closed_during_call = threading.Event(), threading.Event(), []

    def delayed(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            in_call.set()
            closed.wait(0.3)
            closed_during_call.append(closed.is_set())
            return real(*arguments)

        return call

    def close() -> None:
        in_call.wait(10)
        tier.close()
        closed.set()

    monkeypatch.setattr(os, "preadv", delayed(os.preadv))
    for name in ("clear", "write"):
        monkeypatch.setattr(tier.records, name, delayed(getattr(tier.records, name)))
    with ThreadPoolExecutor(1) as other:
        closer = other.submit(close)
        match verb:
            case "load":
                assert load_hits(tier, keys) == [True] * 2
            case "store":
                assert tier.store(new, blocks_of(new)) == [False] * 2  # the tier has closed by then
            case _:
                tier.remove(keys)
        closer.result()
    assert closed_during_call
    assert not any(closed_during_call)
    with closing(open_disk(tmp_path)) as reopened:
        assert load_hits(reopened, keys) == [verb != "remove"] * 2
        assert load_hits(reopened, new) == [verb == "store"] * 2


def test_disk_close_while_a_read_hangs_returns_and_leaves_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, real = keys_of("a", 1), os.preadv
    in_read, resume = threading.Event(), threading.Event()
    tier = open_disk(tmp_path)
    tier.store(keys, blocks_of(keys))

    def hang(*arguments: Any) -> int:
        in_read.set()
        resume.wait(10)
        return real(*arguments)

    tier.close_timeout_s = 0.01
    monkeypatch.setattr(os, "preadv", hang)
    with ThreadPoolExecutor(1) as other:
        reader = other.submit(load_hits, tier, keys)
        in_read.wait(10)
        tier.close()
        assert tier.contains(keys) == [False]
        resume.set()
        assert reader.result() == [True]  # its files were still open
    tier.pool.close(10)
    tier.directory.close()


def test_disk_with_closed_pool_misses_and_declines(tmp_path: Path) -> None:
    """This happens when a call comes while the tier is being closed."""
    keys, new = keys_of("a", 2), keys_of("new", 2)
    with closing(open_disk(tmp_path)) as tier:
        tier.store(keys, blocks_of(keys))
        tier.pool.close(10)
        assert load_hits(tier, keys) == [False] * 2
        assert tier.store(new, blocks_of(new)) == [False] * 2
        assert tier.index.pinned_slots == 0
        tier.index.check()


def test_disk_store_while_the_only_slot_is_read_declines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = keys_of("old", 1), keys_of("new", 1)
    real, answers = os.preadv, []
    with closing(open_disk(tmp_path, 1)) as tier:
        tier.store(old, blocks_of(old))

        def read(*arguments: Any) -> int:
            answers.append(writer.submit(tier.store, new, blocks_of(new)).result(10))
            return real(*arguments)

        with ThreadPoolExecutor(1) as writer:
            monkeypatch.setattr(os, "preadv", read)
            assert load_hits(tier, old) == [True]
        assert answers == [[False]]


def test_disk_store_clears_the_record_before_and_writes_it_after_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = keys_of("old", 1), keys_of("new", 1)
    steps: list[str] = []
    with closing(open_disk(tmp_path, 1)) as tier:
        tier.store(old, blocks_of(old))

        def step(name: str, real: Any) -> Any:
            def call(*arguments: Any) -> Any:
                steps.append(name)
                return real(*arguments)

            return call

        monkeypatch.setattr(os, "pwritev", step("block", os.pwritev))
        for name in ("clear", "write"):
            real = getattr(tier.records, name)
            monkeypatch.setattr(tier.records, name, step(name, real))
        assert tier.store(new, blocks_of(new)) == [True]
    assert steps == ["clear", "block", "write"]
