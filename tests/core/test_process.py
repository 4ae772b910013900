"""A forked child cannot use what its parent opened, and ends none of it."""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache import metrics
from kvcache.guards.front_tier import GuardedFrontTier
from kvcache.process import ForkedError
from kvcache.profiles import open_stack
from kvcache.replay.recorder import FileRecorder
from kvcache.sizes import DiskSize, Size
from kvcache.slab import PAGE, Slab
from kvcache.stack import Stack
from kvcache.testing import block_of, keys_of
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.disk.reader import Reader as DiskReader
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import Framed
from tests.core.test_metrics import Reader
from tests.support.forked_children import (
    ignore_fork_warnings,
    methods_usable_in_child,
    run_in_child,
)
from tests.support.stack_under_test import LONG, StackUnderTest

KEYS = keys_of("parent", 8)


@pytest.fixture
def below() -> Iterator[StackUnderTest]:
    below = StackUnderTest()
    assert below.put(KEYS) == len(KEYS)
    assert below.stack.flush(LONG)
    yield below
    assert below.fetch_count(KEYS) == len(KEYS)  # byte for byte
    assert below.stack.flush(LONG)
    below.check_invariants()
    below.stack.close()


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """The parts of a stack as a profile opens them."""
    profile = tmp_path / "disk.toml"
    profile.write_text(
        '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'
        f'[[tier]]\nname = "disk"\nkind = "disk"\npath = "{tmp_path}/disk"\ncapacity = "1MiB"\n'
    )
    monkeypatch.setenv("KVCACHE_RECORD", str(tmp_path / "asked.jsonl"))
    stack = open_stack(str(profile), block_nbytes=PAGE)
    stack.front.slab.wait_populated()
    with stack.reserve(KEYS) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, PAGE)
    assert stack.flush(LONG)
    yield stack
    stack.close()


def held(stack: Stack) -> list[bytes]:
    with stack.fetch(stack.match(KEYS).result(LONG)).result(LONG) as lease:
        return [bytes(view) for view in lease.views]


def test_stack_in_a_child_refuses_every_method_and_the_parent_goes_on(on_disk: Stack) -> None:
    [lower] = on_disk.lower.tiers
    framed = lower.channel.tier
    assert isinstance(framed, Framed)
    parts = (
        on_disk, on_disk.front, on_disk.front.slab, on_disk.recorder, on_disk.lower, lower,
        lower.channel.workers, framed, framed.inner,
    )  # fmt: skip
    assert methods_usable_in_child(*parts) == []
    assert held(on_disk) == [block_of(key, PAGE) for key in KEYS]
    on_disk.front.remove(KEYS)  # what the disk has is whole as well, and it is still open
    assert held(on_disk) == [block_of(key, PAGE) for key in KEYS]


def test_front_tier_of_a_third_party_in_a_child_refuses_every_method() -> None:
    class Theirs(DramTier):
        pass

    stack = Stack(Theirs(block_nbytes=PAGE, capacity=Size(16 * PAGE)), profile="test")
    assert isinstance(stack.front, GuardedFrontTier)
    stack.front.slab.wait_populated()
    with stack.reserve(KEYS) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, PAGE)
    assert methods_usable_in_child(stack, stack.front, stack.front.inner) == []
    assert held(stack) == [block_of(key, PAGE) for key in KEYS]
    stack.close()


def test_front_tier_that_allows_no_subclass_costs_a_child_no_other_refusal() -> None:
    class Theirs(DramTier):
        def __init_subclass__(cls) -> None:
            raise TypeError("no subclass of this")

    stack = Stack(Theirs(block_nbytes=PAGE, capacity=Size(16 * PAGE)), profile="test")
    assert methods_usable_in_child(stack, stack.front, stack.front.slab) == []
    stack.close()


def test_disk_that_a_child_closed_stays_locked_by_the_parent(
    on_disk: Stack, tmp_path: Path
) -> None:
    run_in_child(on_disk.close)
    with pytest.raises(ValueError, match="has open"):
        DiskTier(block_nbytes=PAGE, path=f"{tmp_path}/disk", capacity=DiskSize(1 << 20))


def test_disk_reader_in_a_child_refuses_every_method(on_disk: Stack, tmp_path: Path) -> None:
    reader = DiskReader(tmp_path / "disk")
    assert methods_usable_in_child(reader) == []
    buffer = memoryview(bytearray(3 * PAGE))
    assert all(reader.load([record.key], [buffer])[0] for record in reader)
    reader.close()


def test_recorder_in_a_child_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    recorder = FileRecorder(path, block_tokens=1, limit=1 << 20)
    assert methods_usable_in_child(recorder) == []
    recorder.record(KEYS)
    recorder.close()
    assert len(path.read_text().splitlines()) == 1


def test_lease_in_a_child_lends_no_memory_and_ends_nothing(below: StackUnderTest) -> None:
    filling, reading = below.stack.reserve(keys_of("more", 2)), below.fetch(KEYS)

    def child() -> None:
        for lease in (filling, reading):
            with pytest.raises(ForkedError), lease:
                lease.views[0][:] = bytes(PAGE)
            lease.end(failed=lease.keys)

    with below.front.lock:  # a thread of the parent has it when the child begins
        run_in_child(child)
    assert below.front.stats().pinned_slots == 2 + len(KEYS)
    filling.end(failed=filling.keys)
    reading.end()


def test_view_that_a_child_inherited_cannot_be_written(below: StackUnderTest) -> None:
    lease = below.fetch(KEYS)
    view = lease.views[0]
    with ignore_fork_warnings():
        pid = os.fork()
    if not pid:
        faulthandler.disable()
        view[:] = bytes(PAGE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) < 0
    assert bytes(view) == block_of(KEYS[0], PAGE)
    lease.end()


def test_child_attaches_the_memory_and_opens_a_stack_of_its_own(below: StackUnderTest) -> None:
    slab, slot = below.front.slab, below.fetch(KEYS)

    def child() -> tuple[bytes, int]:
        theirs = Slab.attach(slab.descriptor)
        own = StackUnderTest()
        own.put(KEYS[:3])
        found = own.fetch_count(KEYS)
        own.stack.close()
        return bytes(theirs.view(slot.slots[0])), found

    assert run_in_child(child) == (block_of(KEYS[0], PAGE), 3)
    slot.end()


def test_grandchild_is_refused_what_its_parent_opened(below: StackUnderTest) -> None:
    def child() -> list[str]:
        own = StackUnderTest()
        return methods_usable_in_child(own.stack, below.stack)

    assert run_in_child(child) == []


def test_parts_of_the_parent_are_not_collected_in_a_child(below: StackUnderTest) -> None:
    ended: list[int] = []

    class Connection:
        def __del__(self) -> None:
            ended.append(os.getpid())

    holder = StackUnderTest()
    holder.stack.farewell = Connection()  # type: ignore[attr-defined]

    def child() -> list[int]:
        nonlocal holder
        del holder
        gc.collect()
        return ended

    assert run_in_child(child) == []
    holder.stack.close()


def test_metrics_of_a_child_count_what_the_child_opened(below: StackUnderTest) -> None:
    reader = Reader()
    metrics.create_instruments(reader.provider.get_meter("kvcache"))

    def collected() -> float:
        used: float = reader.values().get(metrics.USAGE.name, {}).get(("l1",), 0)
        return used

    def child() -> tuple[float, float]:
        alone = collected()
        own = StackUnderTest()
        own.put(KEYS[:3])
        return alone, collected()

    with metrics._collector._lock:
        assert run_in_child(child) == (0, 3 * PAGE)
    assert collected() == len(KEYS) * PAGE
    reader.provider.shutdown()
