"""`CudaDevice` without a GPU: torch's streams and the CUDA runtime are fakes, the rest is real.

A fake stream does its work at once. The kernel is real and interpreted. Since an interpreted kernel
can access any memory of this process, every table that it receives is checked against the
registered memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import numpy as np
import torch

from kvcache.connectors.layout.placement import BlockRun
from kvcache.connectors.transfer.autotune import TrialSize
from kvcache.connectors.transfer.base import CopyGeometry, Integers
from kvcache.connectors.transfer.cuda import CudaDevice, backends, device
from kvcache.connectors.transfer.cuda import driver as driver_module
from kvcache.connectors.transfer.cuda.driver import DriverBatch
from kvcache.connectors.transfer.device import DeviceCopier
from kvcache.slab import Slab
from tests.connectors.test_triton_kernel import load
from tests.support.played_cuda import DEVICE, DEVICE_NUMBER, FakeDriver, FakeRuntime, install

LAYERS, BLOCKS, PAGE, SLOTS = 4, 24, 4096, 16
SMALL_TRIAL = TrialSize(scratch_nbytes=512 << 10, runs=16, rounds=2)  # the interpreter is slow


class InterpretedKernel:
    """The interpreted kernel, and the tables that it received."""

    def __init__(self, fake: FakeRuntime) -> None:
        self.fake = fake
        self.sent: list[Integers] = []
        self.change: Callable[[Integers], None] = lambda table: None
        self.backend = load(interpreted=True).TritonKernel(self.send)

    def send(self, table: Integers) -> torch.Tensor:
        self.change(table)
        self.sent.append(table)
        targets, sources, nbytes = table.tolist()
        for target, source, count in zip(targets, sources, nbytes, strict=True):
            assert self.fake.is_registered(target, count) or self.fake.is_registered(source, count)
        self.fake.seconds += 3e-6
        return torch.from_numpy(table)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    return install(FakeRuntime(), monkeypatch)


@pytest.fixture
def kernel(fake: FakeRuntime) -> InterpretedKernel:
    return InterpretedKernel(fake)


@pytest.fixture
def cuda(fake: FakeRuntime, kernel: InterpretedKernel) -> CudaDevice:
    copy_backends = [backends.CopyPerRun(), kernel.backend]
    return CudaDevice(DEVICE, copy_backends, trial_size=SMALL_TRIAL)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def batching(fake: FakeRuntime, driver: FakeDriver) -> Iterator[Engine]:
    """An engine on a device without a kernel and with the batched copy."""
    batched = backends.BatchedCopies(DriverBatch(driver))
    engine = Engine(CudaDevice(DEVICE, (batched, backends.CopyPerRun()), trial_size=SMALL_TRIAL))
    yield engine
    engine.close()


class Engine:
    """Pages, a slab, and a copier between them."""

    def __init__(self, cuda: CudaDevice) -> None:
        self.cuda = cuda
        self.pages = torch.randint(0, 256, (LAYERS, BLOCKS, PAGE), dtype=torch.uint8)
        self.slab = Slab.create(SLOTS, LAYERS * PAGE)
        geometry = CopyGeometry(
            [BlockRun(layer.data_ptr(), PAGE, PAGE, BLOCKS) for layer in self.pages],
            slab_address=self.slab.address,
            slots=SLOTS,
            slot_nbytes=self.slab.slot_nbytes,
        )
        self.copier = DeviceCopier(geometry, device=cuda)

    def store_and_load(self) -> None:
        """Store eight blocks, load them into others, and compare the bytes."""
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
def engine(cuda: CudaDevice) -> Iterator[Engine]:
    engine = Engine(cuda)
    yield engine
    engine.close()


def test_kernel_faster_in_the_trial_copies_the_pages(
    cuda: CudaDevice, engine: Engine, kernel: InterpretedKernel, caplog: pytest.LogCaptureFixture
) -> None:
    engine.store_and_load()
    assert not kernel.sent  # nothing is pinned yet
    with caplog.at_level(logging.INFO):
        engine.slab.populate(engine.copier.pin_slots)
        cuda.wait_for_trial()
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    assert ": triton for runs up to " in caplog.text
    tried = len(kernel.sent)
    assert tried
    engine.store_and_load()
    assert len(kernel.sent) == tried + 2


def test_pci_address_is_the_one_of_the_device_in_sys(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE_NUMBER + 1)
    assert cuda.pci_address == ""  # no such device
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE_NUMBER)
    assert cuda.pci_address == "0000:3b:00.0"


def test_kernel_never_touches_memory_that_is_not_pinned(
    cuda: CudaDevice, engine: Engine, kernel: InterpretedKernel
) -> None:
    engine.copier.pin_slots(SLOTS)
    cuda.wait_for_trial()
    tried = len(kernel.sent)
    cuda.unpin(engine.slab.address)
    engine.store_and_load()
    assert len(kernel.sent) == tried
    assert cuda.pin(engine.slab.address, 5 * engine.slab.slot_nbytes) == ""
    engine.store_and_load()  # three of the eight slots are not pinned
    assert len(kernel.sent) == tried


@pytest.mark.parametrize(("address_shift", "pointer_error"), [(1 << 40, 0), (0, 1)])
def test_kernel_with_other_addresses_on_the_device_is_not_used(
    cuda: CudaDevice,
    engine: Engine,
    kernel: InterpretedKernel,
    fake: FakeRuntime,
    address_shift: int,
    pointer_error: int,
) -> None:
    fake.address_shift, fake.pointer_error = address_shift, pointer_error
    engine.copier.pin_slots(SLOTS)
    cuda.wait_for_trial()
    engine.store_and_load()
    assert not kernel.sent
    assert not fake.pending_error


def test_new_stream_in_the_background_has_the_lowest_priority(
    cuda: CudaDevice, fake: FakeRuntime
) -> None:
    cuda.new_stream()
    cuda.new_stream(background=True)
    assert fake.priorities == [-5, 0]


def test_trial_leaves_only_the_slab_pinned(
    cuda: CudaDevice, engine: Engine, fake: FakeRuntime
) -> None:
    engine.copier.pin_slots(SLOTS)
    cuda.wait_for_trial()
    assert fake.registered == {engine.slab.address: engine.slab.nbytes}
    engine.copier.close()
    assert fake.registered == {}


def test_pinning_thread_touches_no_other_device(
    cuda: CudaDevice, engine: Engine, fake: FakeRuntime
) -> None:
    populating = threading.Thread(target=engine.copier.pin_slots, args=(SLOTS,))
    populating.start()
    populating.join()
    cuda.wait_for_trial()
    engine.store_and_load()
    assert fake.restored == {DEVICE}
    assert fake.registered


def test_unpin_waits_for_the_trial(
    cuda: CudaDevice, engine: Engine, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.copier.pin_slots(SLOTS)
    cuda.wait_for_trial()
    fake.calls.clear()
    monkeypatch.setattr(cuda, "wait_for_trial", lambda: fake.calls.append("wait"))
    engine.copier.close()
    calls = [call for call in fake.calls if call != "synchronize"]
    assert calls == ["wait", "unregister"]


def test_pin_a_second_extent_starts_no_second_trial(
    cuda: CudaDevice, engine: Engine, kernel: InterpretedKernel
) -> None:
    half = engine.slab.nbytes // 2
    assert cuda.pin(engine.slab.address, half) == ""
    cuda.wait_for_trial()
    tried = len(kernel.sent)
    assert cuda.pin(engine.slab.address + half, half) == ""
    cuda.wait_for_trial()
    assert len(kernel.sent) == tried
    engine.store_and_load()  # in both extents
    assert len(kernel.sent) == tried + 2
    for address in (engine.slab.address, engine.slab.address + half):
        cuda.unpin(address)


def test_pin_a_second_extent_waits_for_the_trial(
    cuda: CudaDevice, engine: Engine, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the trial would measure how long it waits for the driver's lock."""
    half = engine.slab.nbytes // 2
    assert cuda.pin(engine.slab.address, half) == ""
    cuda.wait_for_trial()
    fake.calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "wait_for_trial", lambda: fake.calls.append("wait"))
        assert cuda.pin(engine.slab.address + half, half) == ""
    assert fake.calls == ["wait", "register"]
    for address in (engine.slab.address, engine.slab.address + half):
        cuda.unpin(address)


def test_pin_restores_the_capture_mode_of_its_thread(
    cuda: CudaDevice, engine: Engine, fake: FakeRuntime
) -> None:
    assert cuda.pin(engine.slab.address, engine.slab.nbytes) == ""
    assert fake.capture_mode() == 0
    cuda.unpin(engine.slab.address)
    assert fake.capture_mode() == 0


def test_trial_that_raises_is_logged_and_the_default_copies(
    cuda: CudaDevice,
    engine: Engine,
    kernel: InterpretedKernel,
    fake: FakeRuntime,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: object, earlier: object) -> float:
        raise RuntimeError("invalid resource handle")

    monkeypatch.setattr(device.CudaEvent, "seconds_since", broken)
    engine.copier.pin_slots(SLOTS)
    cuda.wait_for_trial()
    [warning] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert warning.getMessage() == (
        "kvcache: copy backends: trial failed (invalid resource handle); the default backend copies"
    )
    tried = len(kernel.sent)
    engine.store_and_load()
    assert len(kernel.sent) == tried
    assert fake.registered == {engine.slab.address: engine.slab.nbytes}


def test_pin_that_cuda_refuses_returns_its_error(
    cuda: CudaDevice, engine: Engine, kernel: InterpretedKernel, fake: FakeRuntime
) -> None:
    fake.register_error = 2
    assert cuda.pin(engine.slab.address, engine.slab.nbytes) == "out of memory (error 2)"
    assert not fake.pending_error
    cuda.wait_for_trial()
    assert not kernel.sent
    engine.store_and_load()


def test_kernel_that_copies_wrong_bytes_is_disabled(
    cuda: CudaDevice, engine: Engine, kernel: InterpretedKernel, caplog: pytest.LogCaptureFixture
) -> None:
    def read_another_run(table: Integers) -> None:
        table[1] = np.roll(table[1], 1)

    kernel.change = read_another_run
    engine.copier.pin_slots(SLOTS)
    cuda.wait_for_trial()
    assert "copy backend triton disabled" in caplog.text
    engine.store_and_load()


def test_batch_of_the_driver_has_pinned_memory_only(
    batching: Engine, driver: FakeDriver, fake: FakeRuntime
) -> None:
    batching.store_and_load()  # nothing is pinned yet
    assert not driver.batches
    assert fake.runs_copied_singly == 2 * 8 * LAYERS
    address, half = batching.slab.address, batching.slab.nbytes // 2
    assert batching.cuda.pin(address, half) == ""
    batching.cuda.wait_for_trial()
    driver.batches.clear()
    batching.store_and_load()  # one of the eight slots is not pinned
    assert not driver.batches
    assert batching.cuda.pin(address + half, half) == ""
    fake.runs_copied_singly = 0
    batching.store_and_load()
    store, load = driver.batches
    assert not fake.runs_copied_singly
    for host, nbytes in ((store.targets, store.nbytes), (load.sources, load.nbytes)):
        assert len(host) == 8 * LAYERS
        assert all(map(fake.is_registered, host, nbytes))
    assert (store.attributes[0], load.attributes[0]) == (1, 3)  # stream order, any order
    for begin in (address, address + half):
        batching.cuda.unpin(begin)


@pytest.mark.parametrize(("host_addresses", "address_shift"), [(0, 1 << 40), (0, 0), (1, 1 << 40)])
def test_device_without_host_addresses_copies_each_run_by_a_call(
    batching: Engine,
    driver: FakeDriver,
    fake: FakeRuntime,
    host_addresses: int,
    address_shift: int,
) -> None:
    fake.host_addresses, fake.address_shift = host_addresses, address_shift
    batching.copier.pin_slots(SLOTS)
    batching.cuda.wait_for_trial()
    batching.store_and_load()
    assert not driver.batches


def test_store_with_a_batch_that_fails_raises_after_the_rest_is_done(
    batching: Engine, driver: FakeDriver, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    batching.copier.pin_slots(SLOTS)
    batching.cuda.wait_for_trial()
    monkeypatch.setattr(driver_module, "MAX_DESCRIPTORS", 10)
    driver.failures[len(driver.batches) + 2] = 1, 0  # the second call
    fake.calls.clear()
    with pytest.raises(RuntimeError, match=r"did not copy 32 runs from run 10 on: invalid"):
        batching.copier.gather([*range(8)], [*range(8)])
    assert fake.calls == ["synchronize"]  # for the runs of the first call
    batching.store_and_load()
    assert len(driver.batches[-1].nbytes) == 2  # the rest of 32 runs
