"""`Cuda` where there is no GPU: torch's streams and CUDA's runtime are played, all else is real.

A played stream does at once what it is given. The kernel is real, and interpreted: what it touched
beside registered memory would be this process's, so the tables that it is sent are looked at.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import numpy as np
import torch

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer import autotune
from kvcache.connectors.transfer.autotune import CopyBatch
from kvcache.connectors.transfer.base import CopyGeometry, Integers
from kvcache.connectors.transfer.cuda import Cuda, backends, device, runtime
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.slab import Slab
from tests.connectors.test_triton_kernel import load

DEVICE = torch.device("cpu")
FIRST = torch.device("meta")  # another device, which threads are on when they begin
LAYERS, BLOCKS, PAGE, SLOTS = 4, 24, 4096, 16


class Runtime:
    """libcudart, as far as it is called."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self.registered: dict[int, int] = {}
        self.elsewhere = 0  # how far from the host's address the device has registered memory
        self.unreachable = 0  # the code that a question for that is answered with
        self.refuses = 0  # the code that a registration is answered with
        self.unheard = 0  # an error that nobody has fetched
        self.did: list[str] = []
        self.current = threading.local()
        self.current.device = DEVICE  # of this thread, where an engine has chosen
        self.went_back_to: set[torch.device] = set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 3  # portable and mapped
        assert self.here() == DEVICE
        if self.refuses:
            self.unheard = self.refuses
            return self.refuses
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.did.append("unregister")
        del self.registered[address]
        return 0

    def cudaHostGetDevicePointer(self, found: Any, address: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        found._obj.value = address + self.elsewhere
        self.unheard = self.unreachable
        return self.unreachable

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, nbytes: int, kind: int, stream: int
    ) -> int:
        assert (kind, stream) == (4, 0)
        ctypes.memmove(target, source, nbytes)
        self.now += 3e-6
        return 0

    def cudaGetErrorString(self, code: int) -> bytes:  # noqa: N802
        return b"out of memory"

    def cudaGetLastError(self) -> int:  # noqa: N802
        code, self.unheard = self.unheard, 0
        return code

    def here(self) -> torch.device:
        return getattr(self.current, "device", FIRST)

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.current.device = self.here(), device
        yield
        self.current.device = before

    @contextmanager
    def on_stream(self, stream: object) -> Iterator[None]:
        """As torch does: it goes back to the stream, and so to the device, that it came from."""
        before, self.current.device = self.here(), DEVICE
        try:
            yield
        finally:
            self.current.device = before
            self.went_back_to.add(before)

    def holds(self, address: int, nbytes: int) -> bool:
        end = address + nbytes
        return any(at <= address and end <= at + size for at, size in self.registered.items())


class Event:
    def __init__(self, played: Runtime) -> None:
        self.played = played
        self.at = 0.0

    def record(self, stream: object) -> None:
        self.at = self.played.now

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Kernel:
    """The interpreted kernel, and what it was sent."""

    def __init__(self, played: Runtime) -> None:
        self.played = played
        self.sent: list[Integers] = []
        self.mechanism = load(interpreted=True).Kernel(self.send)

    def send(self, table: Integers) -> torch.Tensor:
        self.sent.append(table)
        targets, sources, nbytes = table.tolist()
        for target, source, count in zip(targets, sources, nbytes, strict=True):
            assert self.played.holds(target, count) or self.played.holds(source, count)
        self.played.now += 3e-6
        return torch.from_numpy(table)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    stream = SimpleNamespace(cuda_stream=0, wait_event=lambda event: None)
    monkeypatch.setattr(runtime, "loaded", lambda: made)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(made))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", made.on_stream)
    monkeypatch.setattr(torch.cuda, "device", made.on_device)
    monkeypatch.setattr(device._Scratch, "nbytes", 512 << 10)
    monkeypatch.setattr(autotune, "_RUNS", 16)  # the interpreter is slow
    monkeypatch.setattr(autotune, "_ROUNDS", 2)
    return made


@pytest.fixture
def kernel(played: Runtime) -> Kernel:
    return Kernel(played)


@pytest.fixture
def cuda(played: Runtime, kernel: Kernel) -> Cuda:
    return Cuda(DEVICE, [backends.ByPage(), kernel.mechanism])


class Engine:
    """Pages, a slab as large as its slots, and a copier between them."""

    def __init__(self, cuda: Cuda) -> None:
        self.pages = torch.randint(0, 256, (LAYERS, BLOCKS, PAGE), dtype=torch.uint8)
        self.slab = Slab.create(SLOTS, LAYERS * PAGE)
        sides = CopyGeometry(
            [BlockRun(layer.data_ptr(), PAGE, PAGE, BLOCKS) for layer in self.pages],
            slab_address=self.slab.address,
            slots=SLOTS,
            slot_nbytes=self.slab.slot_nbytes,
        )
        self.copier = DeviceCopier(sides, cuda)

    def go_round(self) -> None:
        """Store eight blocks, load them into others, and see that all is right."""
        blocks, slots, others = [3, 1, 4, 15, 9, 2, 6, 5], [*range(1, 9)], [*range(16, 24)]
        before = self.pages.clone()
        self.copier.gather(blocks, slots).wait()
        for block, slot in zip(blocks, slots, strict=True):
            assert bytes(self.slab.view(slot)) == before[:, block].numpy().tobytes()
        self.copier.scatter(slots, others).wait()
        before[:, others] = before[:, blocks]
        assert torch.equal(self.pages, before)

    def close(self) -> None:
        self.copier.close()
        self.slab.close()


@pytest.fixture
def engine(cuda: Cuda) -> Iterator[Engine]:
    made = Engine(cuda)
    yield made
    made.close()


def test_pages_go_by_the_kernel_when_it_was_tried_and_is_faster(
    cuda: Cuda, engine: Engine, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    engine.go_round()
    assert not kernel.sent  # nothing is pinned yet
    with caplog.at_level(logging.INFO):
        engine.slab.populate(engine.copier.pin_slots)
        cuda.wait_tried()
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    assert "by a kernel (" in caplog.text
    tried = len(kernel.sent)
    assert tried
    engine.go_round()
    assert len(kernel.sent) == tried + 2


def test_what_is_not_pinned_is_not_touched_by_the_kernel(
    cuda: Cuda, engine: Engine, kernel: Kernel, played: Runtime
) -> None:
    engine.copier.pin_slots(SLOTS)
    cuda.wait_tried()
    tried = len(kernel.sent)
    cuda.unpin(engine.slab.address)
    engine.go_round()
    assert len(kernel.sent) == tried
    assert cuda.pin(engine.slab.address, 5 * engine.slab.slot_nbytes) == ""
    engine.go_round()  # three of eight slots are beyond
    assert len(kernel.sent) == tried


@pytest.mark.parametrize(("elsewhere", "unreachable"), [(1 << 40, 0), (0, 1)])
def test_a_device_with_addresses_of_its_own_has_no_copies_by_the_kernel(
    cuda: Cuda, engine: Engine, kernel: Kernel, played: Runtime, elsewhere: int, unreachable: int
) -> None:
    played.elsewhere, played.unreachable = elsewhere, unreachable
    engine.copier.pin_slots(SLOTS)
    cuda.wait_tried()
    engine.go_round()
    assert not kernel.sent
    assert not played.unheard


def test_the_trial_leaves_nothing_pinned(cuda: Cuda, engine: Engine, played: Runtime) -> None:
    engine.copier.pin_slots(SLOTS)
    cuda.wait_tried()
    assert played.registered == {engine.slab.address: engine.slab.nbytes}
    engine.copier.close()
    assert played.registered == {}


def test_a_thread_touches_no_other_device(cuda: Cuda, engine: Engine, played: Runtime) -> None:
    populating = threading.Thread(target=engine.copier.pin_slots, args=(SLOTS,))
    populating.start()
    populating.join()
    cuda.wait_tried()
    engine.go_round()
    assert played.went_back_to == {DEVICE}
    assert played.registered


def test_the_trial_is_over_when_memory_is_unpinned(
    cuda: Cuda, engine: Engine, played: Runtime
) -> None:
    engine.copier.pin_slots(SLOTS)
    cuda.wait_tried()
    played.did.clear()
    cuda._trial = SimpleNamespace(join=lambda: played.did.append("wait"))  # type: ignore[assignment]
    engine.copier.close()
    assert played.did == ["wait", "unregister"]


def test_it_is_tried_once(cuda: Cuda, engine: Engine, kernel: Kernel) -> None:
    half = engine.slab.nbytes // 2
    assert cuda.pin(engine.slab.address, half) == ""
    cuda.wait_tried()
    tried = len(kernel.sent)
    assert cuda.pin(engine.slab.address + half, half) == ""
    cuda.wait_tried()
    assert len(kernel.sent) == tried
    engine.go_round()  # over both pieces
    assert len(kernel.sent) == tried + 2
    for address in (engine.slab.address, engine.slab.address + half):
        cuda.unpin(address)


def test_a_trial_that_breaks_is_told_and_copies_go_on(
    cuda: Cuda,
    engine: Engine,
    kernel: Kernel,
    played: Runtime,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: object, earlier: object) -> float:
        raise RuntimeError("invalid resource handle")

    monkeypatch.setattr(device.CudaEvent, "seconds_since", broken)
    engine.copier.pin_slots(SLOTS)
    cuda.wait_tried()
    [warning] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert warning.getMessage() == (
        "kvcache: ways to copy were not tried, the first one is used: invalid resource handle"
    )
    tried = len(kernel.sent)
    engine.go_round()
    assert len(kernel.sent) == tried
    assert played.registered == {engine.slab.address: engine.slab.nbytes}


def test_memory_that_cuda_does_not_pin_is_said_in_its_words(
    cuda: Cuda, engine: Engine, kernel: Kernel, played: Runtime
) -> None:
    played.refuses = 2
    assert cuda.pin(engine.slab.address, engine.slab.nbytes) == "out of memory (error 2)"
    assert not played.unheard
    cuda.wait_tried()
    assert not kernel.sent
    engine.go_round()


def test_a_kernel_that_copies_wrong_is_not_used(
    cuda: Cuda, engine: Engine, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    sent = kernel.mechanism._send

    def shifted(table: Integers) -> torch.Tensor:
        table[1] = np.roll(table[1], 1)  # it reads another run
        return sent(table)

    kernel.mechanism._send = shifted
    engine.copier.pin_slots(SLOTS)
    cuda.wait_tried()
    assert "nothing is copied by a kernel any more" in caplog.text
    engine.go_round()


def names() -> list[str]:
    return [mechanism.name for mechanism in backends.all_of(DEVICE)]


def test_what_can_copy_here_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "batched", lambda: backends.Batched(None))
    assert names() == ["the copy engine", "a call for each page", "a kernel"]
    monkeypatch.setattr(backends, "batched", lambda: None)
    assert names() == ["a call for each page", "a kernel"]


@pytest.mark.parametrize(
    ("name", "found"),
    [("kvcache.connectors.transfer.cuda.triton_kernel", load(interpreted=True)), ("triton", None)],
    ids=["interpreted", "no Triton"],
)
def test_there_is_no_kernel_where_it_is_not_compiled(
    name: str, found: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "batched", lambda: None)
    monkeypatch.delitem(
        sys.modules, "kvcache.connectors.transfer.cuda.triton_kernel", raising=False
    )
    monkeypatch.setitem(sys.modules, name, found)
    assert names() == ["a call for each page"]


def test_vllm_is_told_sources_first() -> None:
    told: list[list[int]] = []
    operator = backends.Batched(lambda *tensors: told.extend(tensor.tolist() for tensor in tensors))
    one, two, three = (np.array([number], dtype=np.int64) for number in (1, 2, 3))
    operator.copy(CopyBatch(targets=one, sources=two, nbytes=three, way=None))
    assert told == [[2], [1], [3]]


def test_a_copy_that_cuda_refuses_is_said_in_its_words(
    played: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "cudaMemcpyAsync", lambda *_: 2)
    one = np.array([1], dtype=np.int64)
    with pytest.raises(RuntimeError, match=r"a copy of 1 bytes: out of memory \(error 2\)"):
        backends.ByPage().copy(CopyBatch(one, one, one, None))
