"""Workers attach and pin L1 when the scheduler's process announces it, before the first request."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from random import Random

import pytest

pytest.importorskip("vllm")

import torch

from kvcache import numa
from kvcache.connectors.transfer import pinning
from kvcache.connectors.vllm.attach_pipes import (
    Announcement,
    AttachPipes,
    AttachProgress,
    PipeEnd,
)
from kvcache.connectors.vllm.messages import Rank, Shard, Step, Transfer
from kvcache.connectors.vllm.scheduler.announcement import announce, wait_attached
from kvcache.connectors.vllm.worker.early_attach import EarlyAttach
from kvcache.connectors.vllm.worker.side import WorkerSide
from kvcache.process import ForkedError
from kvcache.slab import PAGE, Slab, SlabDescriptor
from tests.support.forked_children import ignore_fork_warnings, run_in_child
from tests.support.recording_worker import one_piece, side
from tests.support.reordering_device import ReorderingDevice

pytestmark = pytest.mark.engine

SLOTS = 32
SLOT_NBYTES = 2 * 2 * 32 * 8 * 4  # both layers of `side`


def run_worker(pipe: Connection) -> None:
    """Run a worker of a CPU engine until it is killed."""
    worker = EarlyAttach(None)
    pipe.send(worker.pipes)
    threading.Event().wait()


class SlowDevice(ReorderingDevice):
    """A device that pins one extent, and the next ones only when `go_on` is set."""

    def __init__(self) -> None:
        super().__init__(Random(0))
        self.first_pinned, self.go_on = threading.Event(), threading.Event()

    def pin(self, address: int, nbytes: int) -> str:
        if self.pinned:
            self.first_pinned.set()
            assert self.go_on.wait(60)
        return super().pin(address, nbytes)


@pytest.fixture
def slab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slab]:
    monkeypatch.setattr(pinning, "EXTENT_NBYTES", 4 * SLOT_NBYTES)
    created = Slab.create(SLOTS, SLOT_NBYTES)
    yield created
    created.close()


def registered(device: ReorderingDevice | None) -> tuple[WorkerSide, dict[Rank, Shard]]:
    """Return a worker with registered caches, and the shards of its engine."""
    worker = side(device=device)
    worker.register({name: torch.rand(16, 2, 32, 8) for name in ("one", "two")})
    shard = worker.shard()
    assert shard is not None
    return worker, {(0, 0): shard}


def shard_with(pipes: AttachPipes) -> Shard:
    return Shard((PAGE,), "host", "form", pipes=pipes)


def send(shards: dict[Rank, Shard], line: bytes) -> None:
    """Write a line to the worker in place of the scheduler's process."""
    pipes = shards[0, 0].pipes
    assert pipes is not None
    fd = pipes.announcement.open(os.O_WRONLY)
    os.write(fd, line)
    os.close(fd)


def test_announced_slab_is_pinned_before_the_first_step(
    slab: Slab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device = ReorderingDevice(Random(0))
    worker, shards = registered(device)
    announce(slab.descriptor, shards, wait=True)
    assert wait_attached(slab.descriptor, shards)
    assert worker.copier is None
    assert sum(device.pinned.values()) == slab.nbytes
    assert len(device.pinned) == SLOTS // 4
    assert "1 of 1 ranks have attached all of L1" in caplog.text
    worker.close()
    assert device.pinned == {}


def test_announced_slab_is_the_one_that_is_copied_to(slab: Slab) -> None:
    device = ReorderingDevice(Random(0))
    worker, shards = registered(device)
    announce(slab.descriptor, shards)
    assert wait_attached(slab.descriptor, shards)
    pinned = dict(device.pinned)
    memory = one_piece(slab.descriptor, SLOT_NBYTES)
    worker.store(Step(memory, stores=[Transfer(1, [3], [5])]))
    device.drain()
    assert device.pinned == pinned
    assert any(slab.view(5))
    worker.close()


def test_first_copy_without_an_announcement_attaches_and_pins(slab: Slab) -> None:
    device = ReorderingDevice(Random(0))
    worker, shards = registered(device)
    worker.store(Step(one_piece(slab.descriptor, SLOT_NBYTES), stores=[Transfer(1, [3], [5])]))
    assert wait_attached(slab.descriptor, shards)
    assert sum(device.pinned.values()) == slab.nbytes
    announce(slab.descriptor, shards)  # late: it changes nothing
    worker.close()
    assert device.pinned == {}


def test_worker_on_a_cpu_maps_the_announced_slab(slab: Slab) -> None:
    worker, shards = registered(None)
    announce(slab.descriptor, shards)
    assert wait_attached(slab.descriptor, shards)
    assert slab.descriptor.name in maps()
    worker.close()


def maps() -> str:
    with open("/proc/self/maps", encoding="utf-8") as file:  # noqa: PTH123
        return file.read()


def test_wait_attached_ends_when_pinning_fails(
    slab: Slab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device = ReorderingDevice(Random(0))
    device.pin_error = "out of memory (error 2)"
    worker, shards = registered(device)
    announce(slab.descriptor, shards, wait=True)
    assert not wait_attached(slab.descriptor, shards)
    assert "L1 pinned (out of memory (error 2))" in caplog.text
    assert "0 of 1 ranks have attached all of L1" in caplog.text
    worker.close()


def test_wait_attached_ends_without_progress(slab: Slab, caplog: pytest.LogCaptureFixture) -> None:
    device = SlowDevice()
    worker, shards = registered(device)
    announce(slab.descriptor, shards, wait=True)
    assert device.first_pinned.wait(60)
    assert not wait_attached(slab.descriptor, shards, stall_s=0.01)
    assert "no worker has attached more of L1" in caplog.text
    device.go_on.set()
    worker.close()


def test_close_during_pinning_unpins_all_extents(slab: Slab) -> None:
    device = SlowDevice()
    worker, shards = registered(device)
    announce(slab.descriptor, shards)
    assert device.first_pinned.wait(60)
    closing = threading.Thread(target=worker.close)
    closing.start()
    device.go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert device.pinned == {}
    assert not wait_attached(slab.descriptor, shards)  # the pipes are closed, too


def test_close_without_an_announcement_ends_the_thread() -> None:
    before = set(threading.enumerate())
    worker, _ = registered(ReorderingDevice(Random(0)))
    worker.close()
    worker.close()
    assert set(threading.enumerate()) <= before


def test_announce_to_a_worker_that_has_ended_is_logged(
    slab: Slab, caplog: pytest.LogCaptureFixture
) -> None:
    worker, shards = registered(None)
    worker.close()
    announce(slab.descriptor, shards, wait=True)
    assert not wait_attached(slab.descriptor, shards)
    assert "tensor rank 0 cannot be reached" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b"[]\n",
        b'{"slab": {}, "wait": false}\n',
        Announcement(SlabDescriptor("/proc/self/fd/0", "", 8, PAGE)).to_line(),
        Announcement(SlabDescriptor("/proc/self/fd/99999", "kvcache-gone", 8, PAGE)).to_line(),
        Announcement(SlabDescriptor("/proc/self/fd/0", "kvcache-a", 8, 0)).to_line(),
        b"[" * 4000 + b"\n",
    ],
)
def test_announcement_of_no_slab_is_logged_and_the_first_copy_attaches(
    line: bytes, slab: Slab, caplog: pytest.LogCaptureFixture
) -> None:
    worker, shards = registered(None)
    send(shards, line)
    assert not wait_attached(slab.descriptor, shards)
    assert "early attach failed" in caplog.text
    worker.store(Step(one_piece(slab.descriptor, SLOT_NBYTES), stores=[Transfer(1, [3], [5])]))
    assert any(slab.view(5))
    worker.close()


def test_first_copy_to_another_slab_than_announced_attaches_that(
    slab: Slab, caplog: pytest.LogCaptureFixture
) -> None:
    other, device = Slab.create(SLOTS, SLOT_NBYTES), ReorderingDevice(Random(0))
    worker, shards = registered(device)
    announce(other.descriptor, shards)
    assert wait_attached(other.descriptor, shards)
    worker.store(Step(one_piece(slab.descriptor, SLOT_NBYTES), stores=[Transfer(1, [3], [5])]))
    device.drain()
    assert any(slab.view(5))
    assert "L1 is another slab than the announced one" in caplog.text
    worker.close()
    assert device.pinned == {}
    other.close()


@pytest.mark.parametrize("is_slab", [False, True])
def test_wrong_announcement_after_the_first_copy_changes_nothing(
    is_slab: bool, slab: Slab, caplog: pytest.LogCaptureFixture
) -> None:
    other, device = Slab.create(SLOTS, SLOT_NBYTES), SlowDevice()
    before = set(threading.enumerate())
    worker, shards = registered(device)
    [thread] = [
        each for each in set(threading.enumerate()) - before if each.name == "kvcache-attach"
    ]
    step = Step(one_piece(slab.descriptor, SLOT_NBYTES), stores=[Transfer(1, [3], [5])])
    worker.store(step)
    assert device.first_pinned.wait(60)
    send(shards, Announcement(other.descriptor).to_line() if is_slab else b"hello\n")
    thread.join(60)
    assert "early attach failed" in caplog.text
    device.go_on.set()
    assert wait_attached(slab.descriptor, shards)
    worker.store(step)
    device.drain()
    assert any(slab.view(5))
    worker.close()
    assert device.pinned == {}
    other.close()


def test_worker_in_another_process_attaches_and_the_wait_ends_when_one_dies(slab: Slab) -> None:
    parent_end, child_end = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=run_worker, args=(child_end,)) for _ in range(2)]
    shards: dict[Rank, Shard] = {}
    for number, child in enumerate(children):
        with ignore_fork_warnings():
            child.start()
        shards[0, number] = shard_with(parent_end.recv())
    first = {(0, 0): shards[0, 0]}
    announce(slab.descriptor, first, wait=True)
    assert wait_attached(slab.descriptor, first)
    waited = threading.Thread(target=wait_attached, args=(slab.descriptor, shards))
    waited.start()
    for child in children:
        child.kill()
        child.join()
    waited.join(60)
    assert not waited.is_alive()


def test_shard_has_the_nodes_of_the_device_at_every_registration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = ReorderingDevice(Random(0))
    device.pci_address = "0000:3b:00.0"
    found = {"0000:3b:00.0": (1,)}
    monkeypatch.setattr(numa, "nodes_of_pci", lambda address: found[address])
    worker, shards = registered(device)
    assert shards[0, 0].nodes == (1,)
    found.clear()
    worker.register({name: torch.rand(16, 2, 32, 8) for name in ("one", "two")})
    assert worker.shard() == shards[0, 0]
    worker.close()


def test_shard_of_a_worker_on_a_cpu_has_the_nodes_of_its_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpus = frozenset(os.sched_getaffinity(0))
    monkeypatch.setattr(numa, "nodes_of_cpus", lambda asked: (0, 2) if asked == cpus else ())
    worker, shards = registered(None)
    assert shards[0, 0].nodes == (0, 2)
    worker.close()


def test_announcement_keeps_the_slab() -> None:
    slab = SlabDescriptor("/proc/1/fd/2", "kvcache-a", 8, PAGE, "/proc/1/fd/3", 2 << 20, (0, 1))
    announcement = Announcement(slab, wait=True)
    assert Announcement.of(announcement.to_line()) == announcement


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 4000,
        b'{"mapped_nbytes": "1", "pinned_nbytes": null}',
        b'{"mapped_nbytes": 1, "pinned_nbytes": true}',
        b'{"mapped_nbytes": 1e400, "pinned_nbytes": null}',
    ],
)
def test_progress_of_a_line_that_no_worker_wrote_raises(line: bytes) -> None:
    with pytest.raises(ValueError, match="not the progress of a worker"):
        AttachProgress.of(line)


def test_progress_keeps_its_numbers() -> None:
    for progress in (AttachProgress(5, None), AttachProgress(5, 3)):
        assert AttachProgress.of(progress.to_line()) == progress


def test_open_of_a_path_that_leads_to_another_file_raises() -> None:
    read, write = os.pipe()
    other, _ = ends = os.pipe()
    with pytest.raises(FileNotFoundError, match="is now pipe:"):
        replace(PipeEnd.of(write), name=PipeEnd.of(other).name).open(os.O_WRONLY)
    for fd in (read, write, *ends):
        os.close(fd)


def test_early_attach_in_a_forked_child_refuses_calls_and_closes_its_pipes(slab: Slab) -> None:
    worker = EarlyAttach(None)
    shards: dict[Rank, Shard] = {(0, 0): shard_with(worker.pipes)}

    def attempt() -> tuple[bool, list[str]]:
        refused = False
        try:
            worker.attach(slab.descriptor)
        except ForkedError:
            refused = True
        worker.close()
        return refused, open_pipes()

    names = {worker.pipes.announcement.name, worker.pipes.progress.name}
    refused, inherited = run_in_child(attempt)
    assert refused
    assert names.isdisjoint(inherited)
    announce(slab.descriptor, shards)
    assert wait_attached(slab.descriptor, shards)
    worker.close()


def open_pipes() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
    return found
