"""The disk tier against fio on the same file, and how fast its index comes back."""

import fcntl
import json
import mmap
import os
import shutil
import statistics
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from kvcache.sizes import DiskSize
from kvcache.tiers import disk
from kvcache.tiers.disk import PAGE, DiskTier

pytestmark = pytest.mark.bench

BLOCK, BLOCKS, AT_ONCE, THREADS, ROUNDS = 2 << 20, 512, 16, 4, 5


def opened(path: Path, blocks: int, nbytes: int) -> DiskTier:
    size = DiskSize(disk._BESIDE + blocks * (nbytes + disk._RECORD_NBYTES))
    return DiskTier(block_nbytes=nbytes, path=str(path), capacity=size, threads=THREADS)


def fio(file: Path, way: Literal["read", "write"]) -> float:
    """Bytes per second with as many blocks under way, as large, of the same file, direct."""
    command = [
        "fio", "--name=disk", f"--filename={file}", "--direct=1", f"--rw={way}", f"--bs={BLOCK}",
        "--ioengine=libaio", f"--iodepth={THREADS}", f"--size={BLOCKS * BLOCK}",
        "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["jobs"][0][way]["bw_bytes"])


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_as_fast_as_fio(tmp_path: Path) -> None:
    memory = memoryview(mmap.mmap(-1, AT_ONCE * BLOCK))
    memory[:] = os.urandom(BLOCK) * AT_ONCE
    views = [memory[at * BLOCK : (at + 1) * BLOCK] for at in range(AT_ONCE)]
    rates: dict[str, list[float]] = {"store": [], "load": [], "write": [], "read": []}
    with closing(opened(tmp_path / "kv", BLOCKS, BLOCK)) as tier:

        def rate(
            call: Callable[[list[bytes], list[memoryview]], Iterable[object]], keys: list[bytes]
        ) -> float:
            begun = time.perf_counter()
            for at in range(0, BLOCKS, AT_ONCE):
                assert all(call(keys[at : at + AT_ONCE], views))
            return BLOCKS * BLOCK / (time.perf_counter() - begun)

        for _ in range(ROUNDS):
            keys = [os.urandom(64) for _ in range(BLOCKS)]
            file = tmp_path / "kv" / "blocks"
            for name, measure in (
                ("store", partial(rate, tier.store, keys)),
                ("write", partial(fio, file, "write")),
                ("load", partial(rate, tier.load, keys)),
                ("read", partial(fio, file, "read")),
            ):
                fio(file, "read")  # a disk owes for what was written in the second before
                rates[name].append(measure())
    usual = {name: statistics.median(each) for name, each in rates.items()}
    print({name: f"{value / 1e9:.2f} GB/s" for name, value in usual.items()})
    assert usual["store"] >= 0.85 * usual["write"]
    assert usual["load"] >= 0.85 * usual["read"]


def test_half_the_processor_of_buffered_input_and_output(tmp_path: Path) -> None:
    """The same calls on the same tier, through the page cache and past it; in turns, from the disk:
    a tier that the page cache could hold would not be needed."""
    memory = memoryview(mmap.mmap(-1, AT_ONCE * BLOCK))
    memory[:] = os.urandom(BLOCK) * AT_ONCE
    views = [memory[at * BLOCK : (at + 1) * BLOCK] for at in range(AT_ONCE)]
    blocks = BLOCKS // 4
    used: dict[str, list[float]] = {}

    def spent(
        call: Callable[[list[bytes], list[memoryview]], Iterable[object]], keys: list[bytes]
    ) -> float:
        """Seconds of processor per GiB, of all threads, the kernel's part included."""
        os.fsync(buffered)
        os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.process_time()
        for at in range(0, blocks, AT_ONCE):
            assert all(call(keys[at : at + AT_ONCE], views))
        return (time.process_time() - begun) / (blocks * BLOCK / 2**30)

    with closing(opened(tmp_path / "kv", blocks, BLOCK)) as tier:
        direct = tier._blocks
        if not fcntl.fcntl(direct, fcntl.F_GETFL) & os.O_DIRECT:
            pytest.skip("this file system takes no direct I/O")
        buffered = tier._file("blocks")
        for _ in range(ROUNDS):
            for way, tier._blocks in (("direct", direct), ("buffered", buffered)):
                keys = [os.urandom(64) for _ in range(blocks)]
                used.setdefault(f"{way} store", []).append(spent(tier.store, keys))
                used.setdefault(f"{way} load", []).append(spent(tier.load, keys))
    least = {name: min(each) for name, each in used.items()}
    print({name: f"{value:.3f} s/GiB" for name, value in least.items()})
    for verb in ("store", "load"):
        assert least[f"direct {verb}"] <= 0.5 * least[f"buffered {verb}"]


def test_an_index_comes_back_fast(tmp_path: Path) -> None:
    blocks = 200_000
    with closing(opened(tmp_path, blocks, PAGE)) as tier:
        for slot in range(blocks):
            fields = disk._RECORD.pack(slot, slot + 1, 64, PAGE, os.urandom(64))
            record = fields + disk._CRC.pack(zlib.crc32(fields))
            os.pwrite(tier._records, record, PAGE + slot * disk._RECORD_NBYTES)
    rate = 0.0
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        with closing(opened(tmp_path, blocks, PAGE)) as tier:
            rate = max(rate, blocks / (time.perf_counter() - begun))
            assert len(tier._index) == blocks
    print(f"{rate:,.0f} blocks/s")
    assert rate >= 200_000
