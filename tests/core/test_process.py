"""A forked child cannot use the objects that its parent opened, and releases none of them."""

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
from kvcache.tiers.disk.reader import DiskReader
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
    assert below.fetch_count(KEYS) == len(KEYS)  # checks every byte
    assert below.stack.flush(LONG)
    below.check_invariants()
    below.stack.close()


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A stack with a disk tier and a recorder, opened by a profile."""
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


def test_stack_in_a_child_refuses_every_method_and_still_works_in_the_parent(
    on_disk: Stack,
) -> None:
    [lower] = on_disk.lower.tiers
    framed = lower.channel.tier
    assert isinstance(framed, Framed)
    opened = (
        on_disk, on_disk.front, on_disk.front.slab, on_disk.recorder, on_disk.lower, lower,
        lower.channel.workers, framed, framed.inner,
    )  # fmt: skip
    assert methods_usable_in_child(*opened) == []
    assert held(on_disk) == [block_of(key, PAGE) for key in KEYS]
    on_disk.front.remove(KEYS)  # so that the blocks come from the disk, which must still be open
    assert held(on_disk) == [block_of(key, PAGE) for key in KEYS]


def test_third_party_front_tier_in_a_child_refuses_every_method() -> None:
    class ThirdPartyTier(DramTier):
        pass

    stack = Stack(ThirdPartyTier(block_nbytes=PAGE, capacity=Size(16 * PAGE)), profile="test")
    assert isinstance(stack.front, GuardedFrontTier)
    stack.front.slab.wait_populated()
    with stack.reserve(KEYS) as lease:
        for key, view in zip(lease.keys, lease.views, strict=True):
            view[:] = block_of(key, PAGE)
    assert methods_usable_in_child(stack, stack.front, stack.front.inner) == []
    assert held(stack) == [block_of(key, PAGE) for key in KEYS]
    stack.close()


def test_front_tier_that_forbids_subclasses_leaves_other_objects_refused() -> None:
    class ThirdPartyTier(DramTier):
        def __init_subclass__(cls) -> None:
            raise TypeError("no subclass of this")

    stack = Stack(ThirdPartyTier(block_nbytes=PAGE, capacity=Size(16 * PAGE)), profile="test")
    assert methods_usable_in_child(stack, stack.front, stack.front.slab) == []
    stack.close()


def test_disk_closed_in_a_child_stays_locked_by_the_parent(on_disk: Stack, tmp_path: Path) -> None:
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


def test_lease_in_a_child_has_no_views_and_ends_nothing(below: StackUnderTest) -> None:
    filling, reading = below.stack.reserve(keys_of("more", 2)), below.fetch(KEYS)

    def child() -> None:
        for lease in (filling, reading):
            with pytest.raises(ForkedError), lease:
                lease.views[0][:] = bytes(PAGE)
            lease.end(failed=lease.keys)

    with below.front.lock:  # as if another thread of the parent held it during the fork
        run_in_child(child)
    assert below.front.stats().pinned_slots == 2 + len(KEYS)
    filling.end(failed=filling.keys)
    reading.end()


def test_view_inherited_by_a_child_cannot_be_written(below: StackUnderTest) -> None:
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


def test_child_can_attach_the_slab_and_open_its_own_stack(below: StackUnderTest) -> None:
    slab, slot = below.front.slab, below.fetch(KEYS)

    def child() -> tuple[bytes, int]:
        attached = Slab.attach(slab.descriptor)
        child_stack = StackUnderTest()
        child_stack.put(KEYS[:3])
        found = child_stack.fetch_count(KEYS)
        child_stack.stack.close()
        return bytes(attached.view(slot.slots[0])), found

    assert run_in_child(child) == (block_of(KEYS[0], PAGE), 3)
    slot.end()


def test_grandchild_cannot_use_the_objects_of_its_parent(below: StackUnderTest) -> None:
    def child() -> list[str]:
        child_stack = StackUnderTest()
        return methods_usable_in_child(child_stack.stack, below.stack)

    assert run_in_child(child) == []


def test_objects_of_the_parent_are_not_collected_in_a_child(below: StackUnderTest) -> None:
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


def test_metrics_of_a_child_count_only_its_own_stacks(below: StackUnderTest) -> None:
    reader = Reader()
    metrics.create_instruments(reader.provider.get_meter("kvcache"))

    def collected() -> float:
        used: float = reader.values().get(metrics.USAGE.name, {}).get(("l1",), 0)
        return used

    def child() -> tuple[float, float]:
        alone = collected()
        child_stack = StackUnderTest()
        child_stack.put(KEYS[:3])
        return alone, collected()

    with metrics.collector.lock:
        assert run_in_child(child) == (0, 3 * PAGE)
    assert collected() == len(KEYS) * PAGE
    reader.provider.shutdown()
