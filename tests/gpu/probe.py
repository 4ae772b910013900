"""Measures the facts about a GPU and its driver on which the copies rest.

Run `python tests/gpu/probe.py`: less than two minutes on one GPU, without vLLM and without a
network. Each part runs in a process of its own, because a driver may end the process.

* attributes: what the device and the kernel of the host can do
* pin: the time to pin memory in pieces, and how long a kernel launch waits meanwhile
* descriptors: batched copies with more and more descriptors in a driver call
* order: loads that read their source in the order of the stream, or in any order
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from kvcache.connectors.transfer.copy_batch import DIRECTIONS, CopyBatch, Direction
from kvcache.connectors.transfer.cuda import driver, runtime

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ROUNDS = 8
DESCRIPTORS = (1024, 4096, 16384, 65536)  # kvcache passes at most driver.MAX_DESCRIPTORS at once
RUNS = (16 * KIB, 64 * KIB, 256 * KIB, 2 * MIB)
ATTRIBUTES = {
    "CanUseHostPointerForRegisteredMem": 91,
    "HostRegisterSupported": 99,
    "PageableMemoryAccess": 88,
    "AsyncEngineCount": 40,
}
FILES = (
    "/proc/version",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/proc/sys/vm/nr_hugepages",
)
SMI = "driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current"
Seconds = tuple[float, float]
"""Of the thread that made the calls, and of the device."""


def print_attributes() -> None:
    """Print versions, attributes of the device, and settings of the host."""
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    for name, number in ATTRIBUTES.items():
        value = ctypes.c_int()
        runtime.library().cudaDeviceGetAttribute(ctypes.byref(value), number, 0)
        print(f"{name}: {value.value}")
    for path in map(Path, FILES):
        print(f"{path}: {path.read_text().strip() if path.exists() else 'missing'}")
    nodes = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    print("NUMA nodes:", ", ".join(nodes) or "unknown")
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", f"--query-gpu={SMI}", "--format=csv"], check=False)


def host_memory(nbytes: int) -> tuple[mmap.mmap, int]:
    """Return shared memory of this process that exists, and its address."""
    memory = mmap.mmap(-1, nbytes)
    memory[::4096] = bytes(-(-nbytes // 4096))
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def pin(address: int, nbytes: int) -> None:
    """Pin memory, or end the process with the cause."""
    if cause := runtime.pin(address, nbytes):
        sys.exit(f"{nbytes >> 20} MiB not pinned: {cause}")


def print_pinning() -> None:
    """Print the rate of pinning by the size of a piece, and the slowest launch meanwhile."""
    number = torch.zeros(8, device="cuda")
    waits: list[float] = []
    ended = threading.Event()

    def launch() -> None:
        while not ended.wait(0.0005):
            begin = time.perf_counter()
            number.add_(1)
            waits.append(time.perf_counter() - begin)

    thread = threading.Thread(target=launch, daemon=True)
    thread.start()
    time.sleep(0.5)
    print(f"slowest launch while nothing is pinned: {max(waits[20:]) * 1e3:.2f} ms")
    memory, address = host_memory(2 * GIB)
    for piece in (64 * MIB, GIB):
        waits.clear()
        begin = time.perf_counter()
        for at in range(0, len(memory), piece):
            pin(address + at, piece)
        seconds = time.perf_counter() - begin
        slowest = max(waits, default=seconds)
        print(
            f"pinned in pieces of {piece >> 20} MiB: {seconds / 2:.3f} s per GiB,"
            f" slowest launch {slowest * 1e3:.2f} ms"
        )
        for at in range(0, len(memory), piece):
            runtime.unpin(address + at)
    ended.set()
    thread.join()


class Rig:
    """Pinned host memory, as much memory of the device, and a stream."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory, self.host = host_memory(nbytes)
        pin(self.host, nbytes)
        self.device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self.stream = torch.cuda.Stream()
        self.batched = driver.DriverBatch(driver.driver_library())

    def batch(self, way: Direction, run: int, direction: Direction | None = None) -> CopyBatch:
        """Return a copy of all runs in random order; `direction` decides the source's order."""
        count = self.nbytes // run
        random = np.random.default_rng(0)
        host, device = (
            base + random.permutation(count).astype(np.int64) * run
            for base in (self.host, self.device.data_ptr())
        )
        targets, sources = (device, host) if way == "load" else (host, device)
        return CopyBatch(targets, sources, np.full(count, run, dtype=np.int64), direction or way)

    def seconds(self, work: Callable[[], object]) -> Seconds:
        """Return the median time of the calls and of the device."""
        taken: list[Seconds] = []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream):
                begin.record(self.stream)
                called = time.perf_counter()
                work()
                called = time.perf_counter() - called
                end.record(self.stream)
            end.synchronize()
            taken.append((called, begin.elapsed_time(end) / 1e3))
        return median(host for host, _ in taken), median(device for _, device in taken)

    def copy(self, batch: CopyBatch) -> Seconds:
        return self.seconds(lambda: self.batched.copy(batch, self.stream.cuda_stream))


def print_descriptors(count: int) -> None:
    """Print the time of batches with so many descriptors in one call of the driver."""
    driver.MAX_DESCRIPTORS = count  # type: ignore[misc]
    rig = Rig(count * 4 * KIB)
    for way in DIRECTIONS:
        called, device = rig.copy(rig.batch(way, 4 * KIB))
        rate = f"{rig.nbytes / device / 1e9:.1f} GB/s"
        print(f"{count} descriptors, {way}: {called * 1e3:.2f} ms of the thread, {rate}")


def print_order() -> None:
    """Print the rates of loads by the order in which they read, beside one contiguous copy."""
    rig = Rig(256 * MIB)
    flat = torch.empty(rig.nbytes, dtype=torch.uint8, pin_memory=True)
    _, whole = rig.seconds(lambda: rig.device.copy_(flat, non_blocking=True))
    print(f"one contiguous load: {rig.nbytes / whole / 1e9:.1f} GB/s")
    for run in RUNS:
        orders: dict[str, Direction] = {"any order": "load", "stream order": "store"}
        rates = []
        for name, direction in orders.items():
            _, device = rig.copy(rig.batch("load", run, direction))
            rates.append(f"{name} {rig.nbytes / device / 1e9:.1f} GB/s")
        print(f"loads of runs of {run >> 10} KiB:", ", ".join(rates))


PARTS: dict[str, Callable[..., None]] = {
    "attributes": print_attributes,
    "pin": print_pinning,
    "order": print_order,
    **{
        f"descriptors={count}": lambda count=count: print_descriptors(count)
        for count in DESCRIPTORS
    },
}


def main() -> int:
    """Run the part that the argument names, or every part in a process of its own."""
    if not torch.cuda.is_available():
        print("no CUDA device; nothing to measure")
        return 0
    if sys.argv[1:]:
        PARTS[sys.argv[1]]()
        return 0
    failed = 0
    for part in PARTS:
        print(f"\n{part}", flush=True)
        try:
            command = [sys.executable, __file__, part]
            code = subprocess.run(command, check=False, timeout=40).returncode
        except subprocess.TimeoutExpired:
            code = 1
            print("no result after 40 s")
        if code:
            failed += 1
            print(f"{part} ended with code {code}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
