"""The disk tier against fio on the same file, and how fast its index comes back."""

import json
import mmap
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from kvcache.sizes import DiskSize
from kvcache.tiers import disk
from kvcache.tiers.disk import PAGE, DiskTier

pytestmark = pytest.mark.bench

BLOCK, BLOCKS, AT_ONCE, THREADS, ROUNDS = 2 << 20, 512, 16, 4, 3


def opened(path: Path, blocks: int, nbytes: int) -> DiskTier:
    size = DiskSize(PAGE + blocks * (nbytes + disk._RECORD_NBYTES))
    return DiskTier(block_nbytes=nbytes, path=str(path), capacity=size, threads=THREADS)


def fio(file: Path, way: str) -> float:
    """Bytes per second of as many threads, with blocks as large, on the same file, direct."""
    share = BLOCKS * BLOCK // THREADS
    command = [
        "fio", "--name=disk", f"--filename={file}", "--direct=1", f"--rw={way}", f"--bs={BLOCK}",
        "--ioengine=psync", f"--numjobs={THREADS}", f"--offset_increment={share}",
        f"--size={BLOCKS * BLOCK}", f"--io_size={share}", "--thread", "--group_reporting",
        "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["jobs"][0][way]["bw_bytes"])


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_as_fast_as_fio(tmp_path: Path) -> None:
    memory = memoryview(mmap.mmap(-1, AT_ONCE * BLOCK))
    memory[:] = os.urandom(BLOCK) * AT_ONCE
    views = [memory[at * BLOCK : (at + 1) * BLOCK] for at in range(AT_ONCE)]
    best = dict.fromkeys(("store", "load", "write", "read"), 0.0)
    with closing(opened(tmp_path / "kv", BLOCKS, BLOCK)) as tier:

        def rate(
            call: Callable[[list[bytes], list[memoryview]], object], keys: list[bytes]
        ) -> float:
            begun = time.perf_counter()
            for at in range(0, BLOCKS, AT_ONCE):
                call(keys[at : at + AT_ONCE], views)
            return BLOCKS * BLOCK / (time.perf_counter() - begun)

        for _ in range(ROUNDS):
            keys = [os.urandom(64) for _ in range(BLOCKS)]
            best["store"] = max(best["store"], rate(tier.store, keys))
            best["load"] = max(best["load"], rate(tier.load, keys))
            for way in ("read", "write"):
                best[way] = max(best[way], fio(tmp_path / "kv" / "blocks", way))
    print({name: f"{value / 1e9:.2f} GB/s" for name, value in best.items()})
    assert best["store"] >= 0.85 * best["write"]
    assert best["load"] >= 0.85 * best["read"]


def test_an_index_comes_back_fast(tmp_path: Path) -> None:
    blocks = 200_000
    with closing(opened(tmp_path, blocks, PAGE)) as tier:
        for slot in range(blocks):
            fields = disk._RECORD.pack(slot, slot + 1, 64, PAGE, os.urandom(64))
            record = fields + disk._CRC.pack(zlib.crc32(fields))
            os.pwrite(tier._records, record, PAGE + slot * disk._RECORD_NBYTES)
    begun = time.perf_counter()
    with closing(opened(tmp_path, blocks, PAGE)) as tier:
        rate = blocks / (time.perf_counter() - begun)
        assert len(tier._index) == blocks
    print(f"{rate:,.0f} blocks/s")
    assert rate >= 200_000
